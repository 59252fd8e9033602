"""Means over updates of what is known on the device, read where a row of metrics is made."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import ALONE, Group

COLUMNS = ("distillation", "adversarial", "d_loss", "d_gap", "r1", "r2", "d_skipped")


class Means:
    """Sums and numbers of values by column, on the device; values that are not finite count for nothing.

    means.add("distillation", losses)
    row |= means.read(group)
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Values [n] of a column; nothing waits."""
        finite = torch.isfinite(values)
        new = torch.stack([torch.where(finite, values, 0).sum(dtype=torch.float64), finite.sum(dtype=torch.float64)])
        self._sums[name] = self._sums[name] + new if name in self._sums else new

    def read(self, group: Group = ALONE) -> dict[str, float]:
        """Means since the last call, over all ranks; this waits for the device."""
        sums = self.state(group)
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(COLUMNS, sums.tolist(), strict=True) if count}

    def state(self, group: Group = ALONE) -> Tensor:
        """Sum and number of every column, over all ranks, on the host [columns, 2]."""
        sums = torch.stack([self._sums.get(name, torch.zeros(2, dtype=torch.float64)).cpu() for name in COLUMNS])
        group.sum_([sums])
        return sums

    def load(self, sums: Tensor, group: Group = ALONE) -> None:
        """Inverse of ``state``, on any number of ranks."""
        self._sums = {name: row for name, row in zip(COLUMNS, sums, strict=True) if row[1]} if group.main else {}
