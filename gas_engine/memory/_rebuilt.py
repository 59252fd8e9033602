"""`rebuilt`: a cheap function that keeps its inputs alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import _native as core


def untransformed() -> bool:
    """No functorch transform, forward-mode AD or compiler looks on."""
    inside = torch._C._functorch.maybe_current_level() is not None or core.transformed()
    return not inside and not torch.compiler.is_compiling()


def plain_autograd() -> bool:
    """Gradients are recorded, and by the autograd tape: transforms and compilers have no hooks for saved tensors."""
    return torch.is_grad_enabled() and untransformed()


Autocast = tuple[str, torch.dtype, bool]


def autocast_state(device: str) -> Autocast:
    """What `torch.autocast` needs to come back to the present state."""
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def as_autocast(state: Autocast) -> AbstractContextManager[Any]:
    """That state again."""
    return nullcontext() if state == autocast_state(state[0]) else torch.autocast(*state)


def rebuilt(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), which keeps its inputs and runs again in the backward pass; for cheap functions.

    Everything else that the function reads is a constant. The same numbers and gradients, bit for bit; differentiable
    once.
    """
    if not plain_autograd():
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
        with torch.enable_grad(), as_autocast(ctx.autocast):
            out = ctx.function(*leaves)
        grads = iter(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], g))
        return None, *(next(grads) if w else None for w in wanted)
