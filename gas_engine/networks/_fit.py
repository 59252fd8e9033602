"""Do weights fit a network? Asked before memory is taken for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def check_fit(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, with the first names, unless the tensors have the names and shapes of the network."""
    with torch.device("meta"):
        wanted = {name: list(value.shape) for name, value in make().state_dict().items()}
    given = {name: list(value.shape) for name, value in tensors.items()}
    faults = {
        "missing": [name for name in wanted if name not in given],
        "left over": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {given[name]} for {wanted[name]}"
            for name in wanted
            if wanted[name] != given.get(name, wanted[name])
        ],
    }
    told = [
        f"{names[0][:100]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {fault}"
        for fault, names in faults.items()
        if names
    ]
    if told:
        raise ValueError(f"the weights do not fit this network: {', '.join(told)}")
