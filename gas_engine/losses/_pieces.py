"""Layers at fixed signs of their activations: what R1 and R2 need in the place of double backward.

Where D is linear, D(x) = <v, x> + const with v = grad_x D, each layer is a matrix at fixed signs of its activations.
Let h_l be what enters layer l, t_l what v becomes on its way to layer l through the same matrices, and u_l the
gradient of D in the layer's output. For one side with s = d loss / d logit,

    d/dW_l [s D + gamma/2 |v|^2] = wgrad(s h_l + gamma t_l, u_l),      d/db_l = s u_l

(the biases move D, not v). So there are three sweeps: `forward` for the signs, `pull` of u from the logit to the image,
which ends in v, and `push` of w = s h + gamma t, which starts as s x + gamma v, meets biases s b, and takes each weight
gradient as it passes. Four passes of every convolution; kept are the signs, one bit each, and u between the sweeps.

Shape legend: B batch, C channels, H W height and width, E embedding channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _native as core
from ..ops import resample2d
from ..ops.reference import accumulation_dtype

Accumulate = Callable[[Tensor, Tensor], None]


class Piece:
    """A layer at the signs of one side: from x to its output, back with cotangents, forward again with w."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def pull(self, u: Tensor, s: Tensor) -> Tensor:
        raise NotImplementedError

    def push(self, w: Tensor, s: Tensor) -> Tensor:
        raise NotImplementedError


class Chain(Piece):
    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        for piece in self.pieces:
            x = piece.forward(x)
        return x

    def pull(self, u: Tensor, s: Tensor) -> Tensor:
        for piece in reversed(self.pieces):
            u = piece.pull(u, s)
        return u

    def push(self, w: Tensor, s: Tensor) -> Tensor:
        for piece in self.pieces:
            w = piece.push(w, s)
        return w


class Residual(Chain):
    """x + chain(x); the chain ends in a convolution, whose fresh result takes the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).add_(x)

    def pull(self, u: Tensor, s: Tensor) -> Tensor:
        return super().pull(u, s).add_(u)

    def push(self, w: Tensor, s: Tensor) -> Tensor:
        return super().push(w, s).add_(w)


class Affine(Piece):
    """What convolutions and linear layers share: the bias, and that u waits for w."""

    u: Tensor

    def __init__(self, m: Any, accumulate: Accumulate) -> None:
        self.m, self.accumulate = m, accumulate

    def matrix(self, like: Tensor) -> Tensor:
        return self.m.weight.to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.biased(self.apply(x), None)

    def pull(self, u: Tensor, s: Tensor) -> Tensor:
        self.u = u
        if self.m.bias is not None:
            self.accumulate(self.m.bias, s @ u.flatten(2).sum(2) if u.dim() > 2 else s @ u)
        return self.transpose(u)

    def push(self, w: Tensor, s: Tensor) -> Tensor:
        if self.m.weight.requires_grad:
            self.accumulate(self.m.weight, self.gradient(w, self.u))
        del self.u
        return self.biased(self.apply(w), s)

    def biased(self, y: Tensor, s: Tensor | None) -> Tensor:
        if self.m.bias is None:
            return y
        bias = self.m.bias.to(y.dtype)
        bias = bias if s is None else s[:, None] * bias
        return y.add_(bias.view(*bias.shape, *[1] * (y.dim() - 2)))

    def apply(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def transpose(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, w: Tensor, u: Tensor) -> Tensor:
        raise NotImplementedError


class Convolution(Affine):
    def __init__(self, m: Any, accumulate: Accumulate) -> None:
        super().__init__(m, accumulate)
        self.geometry = (list(m.stride), list(m.padding), list(m.dilation), False, [0, 0], m.groups)

    def apply(self, x: Tensor) -> Tensor:
        self.size, self.channels_last = list(x.shape), core.layout(x) != torch.contiguous_format
        return torch.ops.aten.convolution(x, self.matrix(x), None, *self.geometry)

    def transpose(self, u: Tensor) -> Tensor:
        return torch.ops.gas_engine.conv_frozen_backward(
            u, self.matrix(u), self.size, self.channels_last, *self.geometry
        )

    def gradient(self, w: Tensor, u: Tensor) -> Tensor:
        wanted = [False, True, False]
        return torch.ops.aten.convolution_backward(u, w, self.matrix(w), None, *self.geometry, wanted)[1]


class Linear(Affine):
    def apply(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"the piecewise method takes linear layers of [B, C] alone, got {list(x.shape)}")
        return F.linear(x, self.matrix(x))

    def transpose(self, u: Tensor) -> Tensor:
        return u @ self.matrix(u)

    def gradient(self, w: Tensor, u: Tensor) -> Tensor:
        return u.T @ w


class Activation(Piece):
    """Leaky ReLU of x + bias[c]. Sample and channel count as one dimension, so that each sample has its own s."""

    bits: Tensor

    def __init__(self, bias: Tensor | None, slope: float, accumulate: Accumulate) -> None:
        self.bias, self.slope, self.accumulate = bias, slope, accumulate

    def forward(self, x: Tensor) -> Tensor:
        one, self.channels_last = _one_sample(x), len(x) == 1 and core.layout(x) != torch.contiguous_format
        bias = self._bias(torch.ones(len(x), dtype=x.dtype, device=x.device))
        y, self.bits = _signs(one, bias, self.slope, self.channels_last)
        return y.view(x.shape)

    def pull(self, u: Tensor, s: Tensor) -> Tensor:
        one = _one_sample(u)
        if self.bias is None:
            return _masked(one, None, self.bits, self.slope, self.channels_last).view(u.shape)
        du, sums = _masked_sums(one, self.bits, self.slope, self.channels_last)
        self.accumulate(self.bias, s.to(sums.dtype) @ sums.view(len(s), -1))
        return du.view(u.shape)

    def push(self, w: Tensor, s: Tensor) -> Tensor:
        bits = self.bits
        del self.bits
        return _masked(_one_sample(w), self._bias(s), bits, self.slope, self.channels_last).view(w.shape)

    def _bias(self, s: Tensor) -> Tensor | None:
        return None if self.bias is None else (s[:, None] * self.bias.to(s.dtype)).flatten()


class Half(Piece):
    """Down by two; its transpose is up by two, with filters of sum 4 there and 1 here."""

    def __init__(self, taps: list[float]) -> None:
        self.taps = taps

    def forward(self, x: Tensor) -> Tensor:
        return resample2d(x, self.taps)

    def pull(self, u: Tensor, s: Tensor) -> Tensor:
        return resample2d(u, self.taps, up=2, down=1).mul_(0.25)

    def push(self, w: Tensor, s: Tensor) -> Tensor:
        return resample2d(w, self.taps)


class Flatten(Piece):
    def __init__(self, m: Any) -> None:
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        return self.m(x)

    def pull(self, u: Tensor, s: Tensor) -> Tensor:
        return u.reshape(self.shape)

    def push(self, w: Tensor, s: Tensor) -> Tensor:
        return self.m(w)


class Readout(Piece):
    """Features [B, E] -> logits [B]: their sum, weighted by the embedding of a class where there is one."""

    def __init__(self, m: Any, cond: Any, accumulate: Accumulate) -> None:
        self.m, self.cond, self.accumulate = m, cond, accumulate

    def forward(self, x: Tensor) -> Tensor:
        self.weights = torch.ones_like(x)
        if self.m.classes:
            self.one_hot = self.m.one_hot(self.cond, x)
            self.weights = self.m.EmbeddingLayer(self.one_hot)
        return (x * self.weights).sum(1)

    def pull(self, u: Tensor, s: Tensor) -> Tensor:
        return u[:, None] * self.weights

    def push(self, w: Tensor, s: Tensor) -> Tensor:
        if self.m.classes:
            self.accumulate(self.m.EmbeddingLayer.weight, w.T @ self.one_hot)
        return (w * self.weights).sum(1)


def _one_sample(x: Tensor) -> Tensor:
    """[B, C, *] as [1, B C, *]."""
    return x if len(x) == 1 else x.contiguous().view(1, -1, *x.shape[2:])


def _signs(x: Tensor, bias: Tensor | None, slope: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Leaky ReLU of x + bias, and its signs: bits from the native op, else booleans."""
    if core.runs_on(x):
        return torch.ops.gas_engine.bias_leaky_relu(x, _wide(bias, x), slope, channels_last)
    x = _plus(x, bias)
    return F.leaky_relu(x, slope), x > 0


def _masked(x: Tensor, bias: Tensor | None, signs: Tensor, slope: float, channels_last: bool) -> Tensor:
    if signs.dtype is torch.bool:
        x = _plus(x, bias)
        return torch.where(signs, x, slope * x)
    return torch.ops.gas_engine.bias_leaky_relu_masked(x, _wide(bias, x), signs, slope, channels_last)


def _masked_sums(u: Tensor, signs: Tensor, slope: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Cotangents behind the activation, and their sum over each channel."""
    if signs.dtype is torch.bool:
        du = _masked(u, None, signs, slope, channels_last)
        return du, du.sum([0, *range(2, u.dim())])
    return torch.ops.gas_engine.bias_leaky_relu_backward(u, signs, slope, channels_last)


def _wide(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(accumulation_dtype(x.dtype))


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2))
