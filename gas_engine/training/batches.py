"""What each update sees: rows of the teacher set, with noise and conditions, shared out over the processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..conditioning import Conditioning, moved
from ..denoiser import Denoiser, seeded
from ..distributed import Group
from .adversary import FRESH
from .turns import Turns


@dataclass(frozen=True)
class Batch:
    """This rank's part of what one update sees: rows of the teacher set, with their noise, conditions and targets
    [B, *shape], seeds of noise that nobody has seen, and its share of the whole batch."""

    rows: list[int]
    noise: Tensor
    cond: Any
    targets: Tensor
    fresh: list[int]
    share: float


class Batches:
    """The batch of every update, which follows from ``seed``, the update's number and ``turns`` alone.

    ``targets`` [N, *shape] are the teacher's samples of ``seeds``; ``stored``: their noise and conditions (tensors, or
    drawn by row), where these do not follow from the seeds. Where turns have scales of guidance, rows are of one.
    """

    def __init__(
        self, denoiser: Denoiser, seeds: list[int], targets: Tensor, stored: tuple[Tensor, Any] | None, size: int,
        seed: int, device: torch.device, group: Group, turns: Turns,
    ) -> None:  # fmt: skip
        self.denoiser, self.seeds, self.targets, self.stored = denoiser, seeds, targets, stored
        self.size, self.seed, self.device, self.group, self.turns = size, seed, device, group, turns
        self._orders: dict[float | None, tuple[int, list[int]]] = {}

    def rows(self, step: int) -> list[int]:
        """Rows of the teacher set in the batch of update ``step``: shuffled epochs, wrapped at their ends."""
        turn = self.turns.at(step)
        mine = self.turns.rows[turn.guidance]
        picked: list[int] = []
        for position in range(turn.visit * self.size, (turn.visit + 1) * self.size):
            epoch, index = divmod(position, len(mine))
            picked.append(mine[self._order(turn.guidance, epoch)[index]])
        return picked

    def _order(self, scale: float | None, epoch: int) -> list[int]:
        """The rows of a scale as an epoch shuffles them."""
        if scale not in self._orders or self._orders[scale][0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._orders[scale] = epoch, torch.randperm(len(self.turns.rows[scale]), generator=generator).tolist()
        return self._orders[scale][1]

    def at(self, step: int) -> Batch:
        """This rank's part of the batch of update ``step``, on the device."""
        rows = self.rows(step)
        part = self.group.part(len(rows))
        mine, fresh = rows[part], [*range(FRESH + step * len(rows), FRESH + (step + 1) * len(rows))][part]
        noise, cond = self._inputs(mine or [0])
        noise, targets = noise[: len(mine)], self.targets[mine]  # a rank may have no rows
        noise, targets, cond = moved((noise, targets, cond), self.device)
        return Batch(mine, noise, cond, targets, fresh, len(mine) / len(rows))

    def _inputs(self, rows: list[int]) -> tuple[Tensor, Any]:
        if self.stored is None:
            return seeded(self.denoiser, [self.seeds[row] for row in rows])
        noise, cond = self.stored
        if isinstance(cond, Conditioning):
            return noise[rows], cond.draw(rows, [torch.Generator().manual_seed(row) for row in rows])
        return noise[rows], tree_map(lambda values: values[rows], cond)
