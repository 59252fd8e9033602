"""Concatenations of a U-Net's decoder, of which the parts are kept and not the whole.

`join` and `keeping_parts` for networks of one's own; `Joined` and `joining` bring the same to those of diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import register_pytree_node

from ..ops.group_norm_silu import spare
from ._rebuilt import plain_autograd
from ._view import Make, StandIn, made


def join(parts: Sequence[Tensor], dim: int = 1) -> Tensor:
    """`torch.cat`, whose parts after the first get gradients with a memory of their own.

    PyTorch hands out views of the joint gradient, so that in a U-Net's backward pass every gradient of a skip
    connection, which waits until the encoder's turn, keeps the decoder's half alive with it. The first part is the
    decoder's own state, whose gradient is used at once.
    """
    if len(parts) == 1:
        return parts[0]
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
        first, *others = zip(g.split(ctx.sizes, ctx.dim), ctx.needs_input_grad[1:], strict=True)
        return None, first[0] if first[1] else None, *(piece.clone() if wanted else None for piece, wanted in others)


def keeping_parts(whole: Tensor, parts: Sequence[Tensor], dim: int = 1) -> AbstractContextManager[Any]:
    """Operations inside that save `whole` for their gradient keep its parts instead, and join them again then."""
    return _KeepingParts(whole, parts, dim) if whole.requires_grad and plain_autograd() else nullcontext()


class _KeepingParts(saved_tensors_hooks):
    def __init__(self, whole: Tensor, parts: Sequence[Tensor], dim: int = 1) -> None:
        parts = [p.detach() for p in parts]
        versions = [p._version for p in parts]
        looks = _looks(whole)

        def unpack(saved: Tensor | list[Tensor]) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            if versions != [p._version for p in saved]:
                raise RuntimeError("a skip connection was changed in place after it had been used")
            return spare(torch.cat(saved, dim))

        super().__init__(lambda t: parts if _looks(t) == looks else t, unpack)


def _looks(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()


class Joined(StandIn):
    """A concatenation that has not run yet; as an argument of a block it runs inside, and its parts are kept."""

    def __init__(self, parts: Sequence[Tensor], dim: int = 0) -> None:
        self.parts, self.dim = parts, dim

    def make(self) -> Tensor:
        return join(self.parts, self.dim)

    def through(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        with keeping_parts(self.settled(), self.parts, self.dim):
            return function(self.settled())


register_pytree_node(
    Joined,
    lambda joined: (list(joined.parts), joined.dim),
    lambda parts, dim: Joined([*parts], dim),  # type: ignore[arg-type]
)


class _Skip(StandIn):
    """A skip connection of a U-Net, on its way to a concatenation."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and all(isinstance(t, Tensor | _Skip) for t in args[0]):
            return Joined([t.settled() if isinstance(t, _Skip) else t for t in args[0]], *args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


_ARGUMENT = "res_hidden_states_tuple"


def joining(module: nn.Module) -> Make | None:
    """For an up block of diffusers, a forward that joins its skip connections inside of its residual blocks."""
    if not type(module).__module__.startswith("diffusers."):
        return None
    parameters = [*inspect.signature(type(module).forward).parameters][1:]
    if _ARGUMENT not in parameters:
        return None
    position, inner = parameters.index(_ARGUMENT), made(module)

    def make(m: Any) -> Callable[..., Any]:
        forward = inner(m)

        def call(*args: Any, **kwargs: Any) -> Any:
            if plain_autograd():
                if _ARGUMENT in kwargs:
                    kwargs[_ARGUMENT] = _skips(kwargs[_ARGUMENT])
                else:
                    args = (*args[:position], _skips(args[position]), *args[position + 1 :])
            return forward(*args, **kwargs)

        return call

    return make


def _skips(states: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_Skip(t) if isinstance(t, Tensor) else t for t in states)
