"""The averaged solver nearest to the teacher so far: what early stopping goes by, and ends with."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..solvers import LearnedTimes


class Best:
    """The smallest distance measured so far, its update and its solver; ``patience`` measurements end a run, 0 never.

    if trainer.best.see(trainer.step, distance, trainer.average):
        ...  # nearer than ever
    """

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.step, self.distance, self.since = 0, math.inf, 0
        self.tensors: dict[str, Tensor] = {}

    @property
    def settled(self) -> bool:
        """Whether it has been the best for as long as was to be waited."""
        return 0 < self.patience <= self.since

    def see(self, step: int, distance: float, solver: LearnedTimes) -> bool:
        """Whether the solver of this update is the new best; a distance of nan never is."""
        if not distance < self.distance:
            self.since += 1
            return False
        self.step, self.distance, self.since = step, distance, 0
        self.tensors = {key: value.clone() for key, value in solver.state_dict().items()}
        return True

    def numbers(self) -> dict[str, Any]:
        return {"step": self.step, "distance": self.distance, "since": self.since}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Inverse of ``tensors`` and ``numbers``."""
        self.step, self.distance = numbers.get("step", 0), numbers.get("distance", math.inf)
        self.since, self.tensors = numbers.get("since", 0), dict(tensors)
