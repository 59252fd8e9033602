"""A network is built for weights: no larger than they are, whatever its arguments say, and without drawing others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.randn)


class BuiltFor(TorchFunctionMode):
    """Within it, parameters stay undrawn, for the weights to be loaded, and ValueError is raised before more numbers
    are made than twice those of the weights, and 2^20.

    with BuiltFor(state_dict.values()):
        network = SongUNet(**arguments_of_a_file)
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = sum(weight.numel() for weight in weights)
        self.left = 2 * self.given + 2**20

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.uniform_, Tensor.normal_):
            return args[0]
        if function in _FACTORIES:
            shape = args[0] if args and isinstance(args[0], (tuple, list)) else args
            self.left -= math.prod(shape)
            if self.left < 0:
                raise ValueError(f"the weights do not fit this network: they are only {self.given:,} numbers")
        return function(*args, **(kwargs or {}))
