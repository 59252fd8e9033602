"""Layers of a U-Net's decoder on a state and a skip connection that are never joined.

B batch, C channels, P pixels; parts [B, C_i, *] of x [B, C, *], C = C_1 + C_2 + ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import _group_norm, conv_frozen, group_norm_silu
from ..ops import _native as core
from ._joined import join, keeping_parts
from ._rebuilt import untransformed


def conv_of_parts(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W x + b = sum_i W_i x_i + b``, a pointwise convolution: no part is copied, and no gradient cut from a whole."""
    if weight.dtype not in (torch.float32, torch.float64) and weight.is_cpu:
        return conv_frozen(join(parts), weight, bias)  # oneDNN has no narrow convolution of a strided weight
    out: Tensor | None = None
    for at, part in _ranges(parts):
        y = conv_frozen(part, weight[:, at], bias if out is None else None)
        out = y if out is None else out.add_(y)  # a convolution of frozen weights keeps no output
    assert out is not None
    return out


def norm_of_parts(
    parts: Sequence[Tensor], num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: str
) -> Tensor:
    """``group_norm_silu`` of the joined parts, which keeps the parts; the same bits.

    Where no group reaches from one part to the next, each is normalised into its place: neither they nor their
    gradients are ever joined. Memory beside the parts: the result and a part of it, where joining takes it twice.
    """
    per_group = sum(p.shape[1] for p in parts) // num_groups
    alone = all(p.shape[1] % per_group == 0 and p.dtype == parts[0].dtype and core.runs_on(p) for p in parts)
    if alone and untransformed():
        out: Tensor = _NormOfParts.apply(per_group, weight, bias, eps, act, *parts)
        return out
    whole = join(parts)
    with keeping_parts(whole, parts):
        return group_norm_silu(whole, num_groups, weight, bias, eps, act=act)


class _NormOfParts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, per_group: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, *parts: Tensor
    ) -> Tensor:  # fmt: skip
        first, channels = parts[0], sum(p.shape[1] for p in parts)
        shape = (len(first), channels, *first.shape[2:])
        out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=core.layout(first))
        statistics: list[Tensor] = []
        for at, part in _ranges(parts):
            piece, *numbers = torch.ops.gas_engine.group_norm_silu(
                part, part.shape[1] // per_group, _of(weight, at), _of(bias, at), None, None, eps, act
            )
            out[:, at] = piece
            statistics += numbers
            del piece
        ctx.options, ctx.count = (per_group, weight, bias, eps, act), len(parts)
        ctx.save_for_backward(*parts, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        per_group, weight, bias, eps, act = ctx.options
        parts, statistics = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        grads: list[Tensor | None] = []
        for i, (at, part) in enumerate(_ranges(parts)):
            if not ctx.needs_input_grad[5 + i]:
                grads.append(None)
                continue
            # A copy, of one sample too: its memory takes the gradient, and bytes are affine in the batch.
            piece = g[:, at].clone(memory_format=core.layout(part))
            numbers = statistics[2 * i : 2 * i + 2]
            grads += _group_norm.gradients(
                piece, part, *numbers, part.shape[1] // per_group, _of(weight, at), _of(bias, at), None, None, eps,
                act, [True, False, False], piece,
            )[:1]  # fmt: skip
        return (None,) * 5 + tuple(grads)


def _of(t: Tensor | None, at: slice) -> Tensor | None:
    return None if t is None else t[at]


def _ranges(parts: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Each part with its channels in the whole."""
    start = 0
    for part in parts:
        yield slice(start, start + part.shape[1]), part
        start += part.shape[1]
