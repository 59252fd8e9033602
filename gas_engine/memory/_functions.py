"""`join`: a concatenation whose gradients do not hold each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, whose parts get gradients with a memory of their own.

    PyTorch hands out views of the joint gradient, so that in a U-Net's backward pass every gradient of a skip
    connection, which waits until the encoder's turn, keeps the decoder's half alive with it.
    """
    out: Tensor = _Join.apply(dim, *parts)
    return out


class _Join(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(dim: int, *parts: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat(parts, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dim, *parts = inputs
        ctx.sizes = [t.shape[ctx.dim] for t in parts]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pieces = zip(g.split(ctx.sizes, ctx.dim), ctx.needs_input_grad[1:], strict=True)
        return None, *(piece.clone() if wanted else None for piece, wanted in pieces)
