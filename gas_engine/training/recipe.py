"""`Recipe`: how parameters are updated, and the two that are named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .adversary import Adversarial
from .soap import SOAP

RateSchedule = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class Recipe:
    """How parameters are updated (arXiv 2510.17699, section 5, for the values of ``paper``).

    ``clip`` bounds the norm of the gradient, and ``max_skipped`` the updates in a row that may not be finite; then the
    run goes back to a checkpoint with half the rate, at most ``max_rollbacks`` times.
    """

    iterations: int
    batch: int
    rate: float
    rate_schedule: RateSchedule
    ema: float
    start_grid: str
    optimizer: str = "adam"
    rate_warm_up: int = 0
    clip: float = 1.0
    max_skipped: int = 20
    max_rollbacks: int = 3
    adversary: Adversarial = field(default_factory=Adversarial)

    def rate_at(self, step: int) -> float:
        """Learning rate of update ``step``, counted from 0: a line up to ``rate``, then constant or down to 0."""
        if step < self.rate_warm_up:
            return self.rate * (step + 1) / (self.rate_warm_up + 1)
        step, steps = step - self.rate_warm_up, self.iterations - self.rate_warm_up
        if self.rate_schedule == "cosine":
            return self.rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        return self.rate * (1 - step / steps) if self.rate_schedule == "linear" else self.rate

    def over(self, cycle: int) -> Recipe:
        """The recipe of a solver that is updated for ``cycle`` K and scales in turn: as many updates for each, averaged
        alike.

        Adam, which sees all of them with the same moments, divides a gradient that comes once in a cycle by
        sqrt(1 / cycle) of itself, so its rate falls by that. SOAP has moments for each.
        """
        rate = self.rate / cycle**0.5 if self.optimizer == "adam" else self.rate
        return replace(self, iterations=self.iterations * cycle, rate=rate, ema=self.ema ** (1 / cycle))

    def optimizer_of(self, parameters: Iterable[Tensor], cycle: int = 1) -> torch.optim.Optimizer:
        """The optimiser; Adam's moments reach back over as many cycles as else over updates."""
        found = OPTIMIZERS[self.optimizer](parameters, lr=self.rate)
        for group in found.param_groups:
            if "turns" in group:
                group["turns"] = cycle
            else:
                group["betas"] = tuple(beta ** (1 / cycle) for beta in group["betas"])
        return found


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "soap": SOAP}
RECIPES = {
    "quick": Recipe(
        800,
        24,
        1e-2,
        "cosine",
        ema=0.99,
        start_grid="quadratic",
        optimizer="soap",
        adversary=Adversarial(weight=1.0, rate=3e-4, gamma=1e-3),
    ),
    "paper": Recipe(10_000, 24, 1e-3, "constant", ema=0.999, start_grid="uniform"),
}
