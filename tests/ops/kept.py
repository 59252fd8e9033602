"""Bytes that a call saves for its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kept_bytes(function: Callable[[], object], *alive: Tensor) -> int:
    """Bytes of the distinct storages saved, without those that live anyway."""
    free = {t.untyped_storage().data_ptr() for t in alive}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in free:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    del result
    return sum(kept.values())
