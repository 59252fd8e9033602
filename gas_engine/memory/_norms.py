"""Norms that wait for what is done with their result: `lean`'s group and layer norms, joined by what follows them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import group_norm_silu
from ._joined import Joined
from ._parts import norm_of_parts
from ._rebuilt import rebuilt
from ._view import StandIn, settle


class DeferredNorm(StandIn):
    """A norm that has not run yet. ``h * factor + shift``, constant over pixels or tokens, joins in."""

    channel = -1

    def __init__(
        self, x: Tensor | Joined, norm: Any, factor: Tensor | None = None, shift: Tensor | None = None
    ) -> None:
        self._x: Any = x
        self._norm, self._factor, self._shift = norm, factor, shift

    @property
    def shape(self) -> torch.Size:
        return self._x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    @property
    def device(self) -> torch.device:
        return self._x.device

    def _per_channel(self, other: Any) -> bool:
        wanted = [1] * len(self.shape)
        wanted[0], wanted[self.channel] = self.shape[0], self.shape[self.channel]
        return isinstance(other, Tensor) and list(other.shape) == wanted

    def __mul__(self, factor: Any) -> Any:
        if self._factor is None and self._shift is None and self._per_channel(factor):
            return type(self)(self._x, self._norm, factor)
        return self.settled() * settle(factor)

    def __add__(self, shift: Any) -> Any:
        if self._shift is None and self._per_channel(shift):
            return type(self)(self._x, self._norm, self._factor, shift)
        return self.settled() + settle(shift)


class DeferredGroupNorm(DeferredNorm):
    """SiLU and GELU run it with themselves, anything else runs it alone, once."""

    channel = 1

    def make(self) -> Tensor:
        return self.activated("none")

    def activated(self, act: str) -> Tensor:
        m, scale = self._norm, None if self._factor is None else self._factor - 1

        x = self._x
        if isinstance(x, Joined) and x.dim == 1 and self._factor is None and self._shift is None:
            return norm_of_parts(x.parts, m.num_groups, m.weight, m.bias, m.eps, act)

        def norm(x: Tensor) -> Tensor:
            return group_norm_silu(x, m.num_groups, m.weight, m.bias, m.eps, scale, self._shift, act)

        return x.through(norm) if isinstance(x, Joined) else norm(x)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls):
            if func is F.silu:
                return args[0].activated("silu")
            if func is F.gelu:
                return args[0].activated("gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu")
        return super().__torch_function__(func, types, args, kwargs)


class DeferredLayerNorm(DeferredNorm):
    """Where factor and shift want gradients (a learned time), the normalised tensor is rebuilt instead of kept."""

    def make(self) -> Tensor:
        m, factor, shift = self._norm, self._factor, self._shift

        def modulated(x: Tensor, factor: Tensor, *shift: Tensor) -> Tensor:
            h = nn.LayerNorm.forward(m, x) * factor
            return h + shift[0] if shift else h

        if factor is None:
            h = nn.LayerNorm.forward(m, self._x)
            return h if shift is None else h + shift
        inputs = (self._x, factor) if shift is None else (self._x, factor, shift)
        return rebuilt(modulated, *inputs) if factor.requires_grad else modulated(*inputs)
