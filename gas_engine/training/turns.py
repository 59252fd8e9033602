"""What each update trains, of a solver for several K or several scales of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch


@dataclass(frozen=True)
class Turn:
    """K of an update, and the scale of guidance of its whole batch where the solver is a function of it.

    ``index``: which of all turns; ``visit``: how many updates before had this scale.
    """

    index: int
    steps: int
    guidance: float | None
    visit: int


class Turns:
    """Each K with each scale once in a cycle, whose order follows from ``seed`` and the cycle's number alone."""

    def __init__(self, steps: Sequence[int], scales: Sequence[float | None] = (None,), seed: int = 0) -> None:
        self.steps, self.scales, self.seed = steps, scales, seed
        self._every = [*product(steps, scales)]

    def __len__(self) -> int:
        return len(self._every)

    def at(self, update: int) -> Turn:
        """The turn of an update, from 0."""
        cycle, place = divmod(update, len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + cycle)
        before = torch.randperm(len(self), generator=generator)[: place + 1].tolist()
        index = before.pop()
        steps, scale = self._every[index]
        visit = cycle * len(self.steps) + sum(self._every[other][1] == scale for other in before)
        return Turn(index, steps, scale, visit)
