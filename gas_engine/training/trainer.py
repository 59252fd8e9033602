"""One training iteration of a solver, and all the state that an exact resume needs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import SCALES, moved, scale_of, take
from ..denoiser import Denoiser, seeded
from ..distributed import ALONE, Group
from ..execution import Execution, out_of_memory
from ..gradients import loss_backward
from ..losses.distillation import Loss
from ..memory import offload, phase
from ..memory.lean import Coverage
from ..rollout import rollout
from ..solvers import LearnedTimes
from ..tableau import Tableau
from ..watch import Watch
from .adversary import Adversary
from .batches import Batch, Batches
from .best import Best
from .directory import load_optimizer, optimizer_tensors, under
from .means import Means
from .recipe import Recipe
from .turns import Turns

# A solver of third order errs as K^-3: with these weights every K of a range counts about alike.
ORDER = 3


class NotFinite(ValueError):
    """Raised when update after update has a loss or gradient that is not finite."""


class OutOfMemory(ValueError):
    """Raised when the cheapest way to run an update does not fit either."""


class Trainer:
    """Fits a solver to teacher samples: Adam or SOAP, clipping of the gradient norm, EMA with warm-up.

    The batch of update i, and whatever a network may draw meanwhile, depends on ``seed`` and i alone, so a resumed run
    sees what it would have seen. Parameters are float64 on the CPU; samples live on ``device``. ``stored``: noise and
    conditions of the targets (tensors, or drawn by row), where they do not follow from ``seeds``.

    An update is, in this order: the batch; a step of the adversary, if there is one; the gradient of the solver; the
    check that it is finite; and only then clipped gradients, optimiser and average, all of them or none. An update
    with a loss or gradient that is not finite is skipped and counted. The adversary's step before it stays: it is whole
    by then, and made of that batch like any other. ``recipe.max_skipped`` in a row raise ``NotFinite``.
    """

    def __init__(
        self, denoiser: Denoiser, solver: LearnedTimes, seeds: list[int], targets: Tensor, loss: Loss,
        recipe: Recipe, execution: Execution, seed: int = 0, device: torch.device | None = None,
        adversary: Adversary | None = None, group: Group = ALONE, stored: tuple[Tensor, Any] | None = None,
    ) -> None:  # fmt: skip
        self.denoiser, self.solver, self.average = denoiser, solver, deepcopy(solver).requires_grad_(False)
        self.loss, self.recipe, self.seed, self.group = loss, recipe, seed, group
        self.device = device or torch.device("cpu")
        told = [None if solver.guidance_range is None else scale_of(denoiser.guidance, n) for n in seeds]
        if solver.guidance_range is not None and len(set(told)) < SCALES:
            raise ValueError(
                f"the {len(seeds)} training seeds have {len(set(told))} of the {SCALES} scales of guidance, and a "
                "scale without seeds would stay as it began; give three seeds in a row or more"
            )
        self.turns = Turns(solver.steps_range, told, seed)
        self.batches = Batches(denoiser, seeds, targets, stored, recipe.batch, seed, self.device, group, self.turns)
        self.adversary, self.watch = adversary, Watch(solver.times())
        self.means = Means() if adversary is None else adversary.means
        if adversary is not None:
            group.broadcast_(adversary.discriminator)
        self.execution, self._view, self._asked = execution, execution.view(denoiser), str(execution)
        self.cheaper = execution.cheaper(denoiser, group.most(recipe.batch))  # what to try when memory runs out
        self.notices: list[str] = []
        self.optimizer = recipe.optimizer_of(solver.parameters(), len(self.turns))
        self.best = Best()
        self.step, self.skipped, self.skipped_in_a_row, self.rollbacks = 0, 0, 0, 0

    @property
    def coverage(self) -> Coverage:
        """What became lean of the network as updates see it."""
        found = getattr(self._view, "coverage", None)
        return found if isinstance(found, Coverage) else Coverage()

    @property
    def finished(self) -> bool:
        return self.step >= self.recipe.iterations or self.best.settled

    @property
    def first_skipped(self) -> int:
        """Updates done before those in a row that were skipped."""
        return self.step - self.skipped_in_a_row

    def rate_at(self, step: int) -> float:
        """Learning rate of update ``step``: the recipe's, halved each time the run went back."""
        return self.recipe.rate_at(step) * 0.5**self.rollbacks

    def steps(self, step: int) -> int:
        """K of update ``step``."""
        return self.turns.at(step).steps

    def update(self) -> Tensor:
        """One update; returns the loss (a scalar on the device, not read here, so that nothing waits for it).

        The host waits for the device where a gradient of the solver arrives on the CPU, with its parameters: once for
        each micro-batch. It knows then all that it needs: a loss that is not finite has left a gradient that is not.
        """
        if not all(bool(p.isfinite().all()) for p in self.solver.parameters()):
            raise NotFinite(f"the solver's parameters are not finite after update {self.step}; {self._advice}")
        torch.manual_seed(self.seed * 1_000_003 + self.step)  # for networks that draw from the global generators
        trained = self._take_turn()
        batch = self._enough(lambda: self.batches.at(self.step))
        adversary = self.adversary if self.adversary is not None and self.adversary.active(self.step) else None
        if adversary is not None:
            fakes = partial(self.samples, batch.fresh, batch.cond)
            self._enough(lambda: adversary.gradient(batch.targets, fakes), adversary)
            adversary.update(self.group, batch.share, 0.5**self.rollbacks)
        loss = self._enough(lambda: self._gradient(batch, adversary))
        loss = self.group.mean_(trained, loss, batch.share)
        norm = torch.nn.utils.clip_grad_norm_(trained, self.recipe.clip)
        self.step += 1
        if not bool(torch.isfinite(norm)):
            self._skip()
            return loss
        self.skipped_in_a_row = 0
        with phase("optimiser"):
            turn = self.turns.at(self.step - 1)
            span = self.solver.span(turn.steps, turn.guidance)
            for group in self.optimizer.param_groups:
                group.update(lr=self.rate_at(self.step - 1), turn=turn.index, span=span)
            self.optimizer.step()
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for shadow, parameter in zip(self.average.parameters(), self.solver.parameters(), strict=True):
                    shadow.lerp_(parameter, 1 - decay)
        return loss

    def _take_turn(self) -> list[nn.Parameter]:
        """The parameters that this update moves; no other has a gradient or wants one."""
        names = self.solver.trained(self.step)
        for name, parameter in self.solver.named_parameters():
            parameter.requires_grad_(name in names)
        return [p for p in self.solver.parameters() if p.requires_grad]

    @torch.no_grad()
    def samples(self, seeds: list[int], cond: Any) -> Tensor:
        """The student's samples from the noise of these seeds, [len(seeds), *shape], micro-batch by micro-batch."""
        tableau = self._tableau()
        done, size = [], self.execution.micro_batch or len(seeds)
        for rows in (slice(i, i + size) for i in range(0, len(seeds), size)):
            noise = moved(seeded(self.denoiser, seeds[rows], conditions=False)[0], self.device)
            done.append(rollout(self._view, noise, tableau, take(cond, rows, len(seeds))))
        return torch.cat(done) if len(done) > 1 else done[0]

    def _gradient(self, batch: Batch, adversary: Adversary | None) -> Tensor:
        """The mean loss of the (rank's) batch, its gradient left in the parameters."""

        weight = (self.steps(self.step) / self.solver.steps) ** ORDER

        def loss(x: Tensor, part: slice) -> Tensor:
            values = self.loss(x, batch.targets[part], batch.rows[part])
            self.means.add("distillation", values.detach())
            values = values if adversary is None else values + adversary.loss(x, batch.targets, part)
            return _telling(weight * values)

        self.optimizer.zero_grad()
        if not batch.rows:
            return torch.zeros(())
        return loss_backward(
            self._view, batch.noise, self._tableau(), loss, batch.cond, self.execution.memory,
            self.execution.micro_batch,
        ).mean()  # fmt: skip

    def _tableau(self) -> Tableau:
        """That of this update's turn."""
        turn = self.turns.at(self.step)
        return self.solver.at(turn.steps, turn.guidance).tableau(self.denoiser.prediction)

    def _enough(self, part: Callable[[], Any], adversary: Adversary | None = None) -> Any:
        """The result of a part of an update, which starts over with a cheaper execution where memory runs out.

        On any rank: all of them go on with the same. An ``adversary`` whose step it is takes fewer pairs first.
        """
        while True:
            result, shortage = None, ""
            try:
                result = part()
            except Exception as error:
                # The other ranks of a network in lockstep wait within it, for a call that will not come.
                if not out_of_memory(error) or self.group.lockstep:
                    raise
                shortage = str(error).splitlines()[0]
            if not self.group.any(bool(shortage)):
                return result
            del result
            # Outside the handler, which holds the frames that hold the memory.
            if adversary is not None and adversary.lighten(self.group.most(self.recipe.batch)):
                self.notices.append(
                    f"update {self.step}: out of memory in the discriminator's step; going on with "
                    f"{adversary.settings.micro_batch} pairs at a time"
                )
                continue
            self._go_on_with_less(shortage or "on another rank")

    def _go_on_with_less(self, shortage: str) -> None:
        """The next cheaper execution."""
        gc.collect()
        offload.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        following = next(self.cheaper, None)
        if following is None:
            raise OutOfMemory(
                f"out of memory at update {self.step}, and there is no cheaper way than {self.execution} "
                f"({shortage}); the last checkpoint is whole: go on with --resume on a larger device"
            )
        self.notices.append(f"update {self.step}: out of memory with {self.execution}; going on with {following}")
        self.execution, self._view = following, following.view(self.denoiser)

    def _skip(self) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.recipe.max_skipped:
            raise NotFinite(
                f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite (at update "
                f"{self.step}, rate {self.rate_at(self.step - 1):g} after going back {self.rollbacks} times); the "
                f"solver is as before them; {self._advice}"
            )

    @property
    def _advice(self) -> str:
        said = f"try a lower --rate than {self.recipe.rate:g}, or --start-grid quadratic"
        if self.adversary is None:
            return said
        return f"{said}, or a lower --discriminator-rate than {self.adversary.settings.rate:g}"

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, numbers) from which ``load`` goes on bit for bit."""
        parts = {"solver": self.solver.state_dict(), "average": self.average.state_dict(), "best": self.best.tensors}
        numbers = {name: getattr(self, name) for name in ("skipped", "skipped_in_a_row", "rollbacks")}
        numbers |= {
            "best": self.best.numbers(),
            "watch": self.watch.state(),
            "execution": [self._asked, str(self.execution)],
        }
        if self.adversary is not None:
            parts["adversary"], numbers["pairs"] = self.adversary.state(self.group), self.adversary.pairs
        parts["metrics"] = {"sums": self.means.state(self.group)}
        tensors = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
        return tensors | optimizer_tensors(self.optimizer), numbers

    def load(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        self.solver.load_state_dict(under("solver", tensors))
        self.average.load_state_dict(under("average", tensors))
        self.best.load(under("best", tensors), numbers.get("best", {}))
        load_optimizer(self.optimizer, tensors)
        if self.adversary is not None:
            self.adversary.load(under("adversary", tensors), self.group)
            self.adversary.take_pairs(*numbers["pairs"])
        self.means.load(under("metrics", tensors)["sums"].to(self.device), self.group)
        self.watch.load(numbers["watch"])
        self.step, self.skipped, self.skipped_in_a_row = step, numbers["skipped"], numbers["skipped_in_a_row"]
        self.rollbacks = numbers.get("rollbacks", 0)
        # Where nothing else was asked for, what did not fit before is not tried again: other ways round otherwise.
        ways = list(self.cheaper)
        at = next((i for i, way in enumerate(ways) if [self._asked, str(way)] == numbers.get("execution")), None)
        if at is not None:
            self.execution, self._view = ways[at], ways[at].view(self.denoiser)
        self.cheaper = iter(ways if at is None else ways[at + 1 :])

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Updates up to the recipe's number: (updates done, loss)."""
        while not self.finished:
            loss = self.update()
            yield self.step, loss


def _telling(losses: Tensor) -> Tensor:
    """The losses, with a gradient that is not finite where they are not: |x| of infinity has the gradient 1.

    Decided on the device: a factor of 1, which changes no bit, or nan.
    """
    return losses * torch.where(torch.isfinite(losses.detach()), 1.0, torch.nan).to(losses.dtype)
