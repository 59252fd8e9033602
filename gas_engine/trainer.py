"""One training iteration of a solver, and all the state that an exact resume needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser, seeded
from .gradients import loss_backward
from .losses.distillation import Loss
from .memory import MemoryPolicy
from .run_directory import load_optimizer, optimizer_tensors
from .soap import SOAP
from .solvers import LearnedTimes

PATIENCE = 20
CLIP = 1.0


@dataclass(frozen=True)
class Recipe:
    """How parameters are updated (arXiv 2510.17699, section 5, for the values of ``paper``)."""

    iterations: int
    batch: int
    rate: float
    cosine: bool
    ema: float
    start_grid: str
    optimizer: str = "adam"

    def rate_at(self, step: int) -> float:
        """Learning rate of update ``step``, counted from 0."""
        return self.rate * (0.5 + 0.5 * math.cos(math.pi * step / self.iterations)) if self.cosine else self.rate


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "soap": SOAP}
RECIPES = {
    "quick": Recipe(800, batch=24, rate=1e-2, cosine=True, ema=0.99, start_grid="quadratic", optimizer="soap"),
    "paper": Recipe(iterations=10_000, batch=24, rate=1e-3, cosine=False, ema=0.999, start_grid="uniform"),
}


class NotFinite(ValueError):
    """Raised when update after update has a loss or gradient that is not finite."""


class Trainer:
    """Fits a solver to teacher samples: Adam or SOAP, clipping of the gradient norm to 1, EMA with warm-up.

    The batch of update i depends on ``seed`` and i alone, so a resumed run sees what it would have seen. Parameters
    are float64 on the CPU; samples live on ``device``. An update with a loss or gradient that is not finite is skipped
    and counted; ``PATIENCE`` of them in a row raise ``NotFinite``.
    """

    def __init__(
        self, denoiser: Denoiser, solver: LearnedTimes, seeds: list[int], targets: Tensor, loss: Loss,
        recipe: Recipe, memory: MemoryPolicy, seed: int = 0, device: torch.device | None = None,
        micro_batch: int | None = None,
    ) -> None:  # fmt: skip
        self.denoiser, self.solver, self.average = denoiser, solver, deepcopy(solver).requires_grad_(False)
        self.seeds, self.targets, self.loss, self.recipe, self.memory = seeds, targets, loss, recipe, memory
        self.seed, self.device, self.micro_batch = seed, device or torch.device("cpu"), micro_batch
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
        rows = self.rows(self.step)
        noise, cond = seeded(self.denoiser, [self.seeds[row] for row in rows])
        cond = cond.to(self.device, non_blocking=True) if cond is not None else None
        noise, targets = (v.to(self.device, non_blocking=True) for v in (noise, self.targets[rows]))
        self.optimizer.zero_grad()
        tableau = self.solver.tableau(self.denoiser.prediction)
        loss = loss_backward(
            self.denoiser, noise, tableau, lambda x, part: self.loss(x, targets[part]), cond, self.memory,
            self.micro_batch,
        ).mean()  # fmt: skip
        norm = torch.nn.utils.clip_grad_norm_(self.solver.parameters(), CLIP)
        self.step += 1
        # The backward pass has already waited for the device, so reading the loss costs no further wait.
        if not bool(torch.isfinite(norm + loss.cpu())):
            self._skip()
            return loss
        self.skipped_in_a_row = 0
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step - 1)
        self.optimizer.step()
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for shadow, parameter in zip(self.average.parameters(), self.solver.parameters(), strict=True):
                shadow.lerp_(parameter, 1 - decay)
        return loss

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
