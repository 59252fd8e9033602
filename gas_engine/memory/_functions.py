"""Two functions of views: `join`, a concatenation, and `rebuilt`, which keeps its inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def autocast_state(device: str) -> tuple[str, torch.dtype, bool]:
    """What `torch.autocast` needs to come back to the present state."""
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def rebuilt(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), which keeps its inputs and runs again in the backward pass; for cheap functions.

    Everything else that the function reads is a constant. The same numbers and gradients, bit for bit; differentiable
    once.
    """
    if not torch.is_grad_enabled() or torch._C._functorch.maybe_current_level() is not None:
        return function(*inputs)
    out: Tensor = _Rebuilt.apply(function, *inputs)
    return out


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.function = function
        ctx.autocast = autocast_state(inputs[0].device.type)
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[1:]
        leaves = [t.detach().requires_grad_(w) for t, w in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            out = ctx.function(*leaves)
        grads = iter(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], g))
        return None, *(next(grads) if w else None for w in wanted)
