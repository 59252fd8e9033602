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
    """Each K with each scale once in a cycle, whose order follows from ``seed`` and the cycle's number alone.

    ``told``: the scale of each row of the teacher set, None where the solver is the same at all; ``rows``: of a scale.
    """

    def __init__(self, steps: Sequence[int], told: Sequence[float | None], seed: int = 0) -> None:
        self.steps, self.seed, self.rows = steps, seed, dict[float | None, list[int]]()
        for row, scale in enumerate(told):
            self.rows.setdefault(scale, []).append(row)
        self._every = [*product(steps, sorted(self.rows, key=lambda scale: scale or 0.0))]

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
