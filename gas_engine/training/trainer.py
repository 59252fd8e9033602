"""One training iteration of a solver, and all the state that an exact resume needs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, seeded
from ..distributed import ALONE, Group
from ..execution import Execution, out_of_memory
from ..gradients import loss_backward
from ..losses.distillation import Loss
from ..memory import offload, phase
from ..solvers import LearnedTimes
from .directory import load_optimizer, optimizer_tensors
from .recipe import OPTIMIZERS, Recipe

PATIENCE = 20
CLIP = 1.0


class NotFinite(ValueError):
    """Raised when update after update has a loss or gradient that is not finite."""


class OutOfMemory(ValueError):
    """Raised when the cheapest way to run an update does not fit either."""


class Trainer:
    """Fits a solver to teacher samples: Adam or SOAP, clipping of the gradient norm to 1, EMA with warm-up.

    The batch of update i depends on ``seed`` and i alone, so a resumed run sees what it would have seen. Parameters
    are float64 on the CPU; samples live on ``device``. An update with a loss or gradient that is not finite is skipped
    and counted; ``PATIENCE`` of them in a row raise ``NotFinite``.
    """

    def __init__(
        self, denoiser: Denoiser, solver: LearnedTimes, seeds: list[int], targets: Tensor, loss: Loss,
        recipe: Recipe, execution: Execution, seed: int = 0, device: torch.device | None = None, group: Group = ALONE,
    ) -> None:  # fmt: skip
        self.denoiser, self.solver, self.average = denoiser, solver, deepcopy(solver).requires_grad_(False)
        self.seeds, self.targets, self.loss, self.recipe = seeds, targets, loss, recipe
        self.seed, self.device, self.group = seed, device or torch.device("cpu"), group
        self.execution, self._view = execution, execution.view(denoiser)
        self.cheaper = execution.cheaper(denoiser, group.most(recipe.batch))  # what to try when memory runs out
        self.notices: list[str] = []
        self._shortage = "on another rank"
        self.optimizer = OPTIMIZERS[recipe.optimizer](solver.parameters(), lr=recipe.rate)
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0

    def rows(self, step: int) -> list[int]:
        """Rows of the teacher set in the batch of update ``step``: shuffled epochs, wrapped at their ends."""
        count, batch = len(self.seeds), self.recipe.batch
        picked: list[int] = []
        for position in range(step * batch, (step + 1) * batch):
            epoch, index = divmod(position, count)
            picked.append(self._order(epoch)[index])
        return picked

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.seeds), generator=generator).tolist()
        return self._permutation

    def update(self) -> Tensor:
        """One update; returns the loss (a scalar on the device, not read here, so that nothing waits for it)."""
        loss = self._gradient()
        while loss is None:
            self._go_on_with_less()
            loss = self._gradient()
        norm = torch.nn.utils.clip_grad_norm_(self.solver.parameters(), CLIP)
        self.step += 1
        # The backward pass has already waited for the device, so reading the loss costs no further wait.
        if not bool(torch.isfinite(norm + loss.cpu())):
            self._skip()
            return loss
        self.skipped_in_a_row = 0
        with phase("optimiser"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.rate_at(self.step - 1)
            self.optimizer.step()
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for shadow, parameter in zip(self.average.parameters(), self.solver.parameters(), strict=True):
                    shadow.lerp_(parameter, 1 - decay)
        return loss

    def _gradient(self) -> Tensor | None:
        """The mean loss of this step's batch, its gradient left in the parameters; None if memory ran out anywhere."""
        rows = self.rows(self.step)
        mine = rows[self.group.part(len(rows))]
        self.optimizer.zero_grad()
        loss = self._gradient_of(mine) if mine else torch.zeros(())
        return self.group.mean_(self.solver.parameters(), loss, len(mine) / len(rows))

    def _gradient_of(self, rows: list[int]) -> Tensor | None:
        """The mean loss of the rows, its gradient left in the parameters; None if memory ran out."""
        try:
            noise, cond = seeded(self.denoiser, [self.seeds[row] for row in rows])
            cond = cond.to(self.device, non_blocking=True) if cond is not None else None
            noise, targets = (v.to(self.device, non_blocking=True) for v in (noise, self.targets[rows]))
            tableau = self.solver.tableau(self.denoiser.prediction)
            return loss_backward(
                self._view, noise, tableau, lambda x, part: self.loss(x, targets[part]), cond,
                self.execution.memory, self.execution.micro_batch,
            ).mean()  # fmt: skip
        except Exception as error:
            # The other ranks of a network in lockstep wait within it, for a call that will not come.
            if not out_of_memory(error) or self.group.lockstep:
                raise
            self._shortage = str(error).splitlines()[0]
            return None

    def _go_on_with_less(self) -> None:
        """The next cheaper execution. The update starts over: its batch depends on nothing that was lost."""
        gc.collect()
        offload.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        following = next(self.cheaper, None)
        if following is None:
            raise OutOfMemory(
                f"out of memory at update {self.step}, and there is no cheaper way than {self.execution} "
                f"({self._shortage}); the last checkpoint is whole: go on with --resume on a larger device"
            )
        self.notices.append(f"update {self.step}: out of memory with {self.execution}; going on with {following}")
        self.execution, self._view = following, following.view(self.denoiser)

    def _skip(self) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= PATIENCE:
            raise NotFinite(
                f"{PATIENCE} updates in a row had a loss or gradient that is not finite (at update {self.step}); the "
                f"solver is as before them; try a lower --rate than {self.recipe.rate:g}, or --start-grid quadratic"
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, numbers) from which ``load`` goes on bit for bit."""
        tensors = {f"solver.{key}": value for key, value in self.solver.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        return tensors, {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        for name, module in (("solver", self.solver), ("average", self.average)):
            module.load_state_dict(
                {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            )
        load_optimizer(self.optimizer, tensors)
        self.step, self.skipped = step, numbers["skipped"]
        self.skipped_in_a_row = numbers["skipped_in_a_row"]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Updates up to the recipe's number: (updates done, loss)."""
        while self.step < self.recipe.iterations:
            loss = self.update()
            yield self.step, loss
