"""`Recipe`: how parameters are updated, and the two that are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .soap import SOAP


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
