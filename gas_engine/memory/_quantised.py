"""A linear layer with quantised weights keeps those, and not what they are dequantised to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._view import Forward


def is_quantised(module: nn.Module) -> bool:
    """A linear layer whose weight is a tensor class of its own that can be dequantised."""
    return type(module) is nn.Linear and hasattr(type(module.weight), "__tensor_flatten__")


def quantised(m: Any) -> Forward:
    return lambda input: linear(input, m.weight, m.bias)


def linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, by the weight's own kernels; dx = g W, dequantised when it is needed."""
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight = ctx.weight
        codes, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
        if codes is not None and scale is not None and scale.numel() == len(codes):
            # A scale for each row: dx = (g s) Q, and no float32 copy of the weight is made on the way.
            return (g * scale.flatten().to(g.dtype)) @ codes.to(g.dtype), None, None
        return g @ weight.dequantize().to(g.dtype), None, None
