"""Layers of a U-Net's decoder on a state and a skip connection that are never joined.

B batch, C channels, P pixels; parts [B, C_i, *] of x [B, C, *], C = C_1 + C_2 + ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import _checks as checks
from ..ops import _group_norm, conv_frozen, group_norm_silu
from ..ops import _native as core
from ._joined import join, keeping_parts
from ._rebuilt import untransformed


def conv_of_parts(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W x + b = sum_i W_i x_i + b``, a pointwise convolution: no part is copied, and no gradient cut from a whole.

    Each part's sum is rounded: relative L2 from the joined convolution below 3e-7 in float32, 1e-15 in float64.
    """
    if weight.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(parts[0].device.type):
        return conv_frozen(join(parts), weight, bias)  # two roundings to 16 bits would show
    if parts[0].is_cpu:
        return _products(parts, weight, bias)
    out: Tensor | None = None  # cuDNN's convolutions may run in TF32, by a switch that products do not heed
    for at, part in _ranges(parts):
        y = conv_frozen(part, weight[:, at], bias if out is None else None)
        out = y if out is None else out.add_(y)  # a convolution of frozen weights keeps no output
    assert out is not None
    return out


def _products(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by products of matrices that add to what is there: no slower, up to twice as fast with the gradient."""
    checks.check_frozen("conv_frozen", weight=weight, bias=bias)
    first = parts[0]
    size, last = len(first), core.layout(first) != torch.contiguous_format
    out = first.new_zeros(()) if bias is None else bias if last else bias[:, None]
    for at, part in _ranges(parts):
        x, w = part.flatten(2), weight[:, at].flatten(1).expand(size, -1, -1)
        product = (x.mT, w.mT) if last else (w, x)
        # Written over from the second on: a product keeps its frozen factor, and no result. Transforms cannot.
        over = out.dim() == 3 and untransformed()
        out = out.baddbmm_(*product) if over else torch.baddbmm(out, *product)
    return (out.mT if last else out).unflatten(2, first.shape[2:])


def norm_of_parts(
    parts: Sequence[Tensor], num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: str
) -> Tensor:
    """``group_norm_silu`` of the joined parts, which keeps the parts; the same bits.

    Where no group reaches from one part to the next, each is normalised into its place: neither they nor their
    gradients are ever joined. Memory beside the parts: the result (and, on a GPU or with channels_last, a part of it),
    where joining takes it twice.
    """
    if untransformed() and _apart(parts, num_groups):
        checks.check_frozen("group_norm_silu", weight=weight, bias=bias)
        out: Tensor = _NormOfParts.apply(num_groups, weight, bias, eps, act, *parts)
        return out
    whole = join(parts)
    with keeping_parts(whole, parts):
        return group_norm_silu(whole, num_groups, weight, bias, eps, act=act)


def _apart(parts: Sequence[Tensor], num_groups: int) -> bool:
    """Whether the parts can be joined, run on the kernels, and share no group."""
    first, channels = parts[0], sum(p.shape[1] for p in parts)
    alike = all(p.shape[0] == first.shape[0] and p.shape[2:] == first.shape[2:] for p in parts)
    alike = alike and all(p.dtype == first.dtype and core.runs_on(p) for p in parts)
    return alike and channels % num_groups == 0 and all(p.shape[1] % (channels // num_groups) == 0 for p in parts)


class _NormOfParts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, *parts: Tensor
    ) -> Tensor:  # fmt: skip
        first, channels = parts[0], sum(p.shape[1] for p in parts)
        per_group = channels // num_groups
        size, spatial = len(first), first.shape[2:]
        if core.layout(first) == torch.contiguous_format:
            out = first.new_empty((size, channels, *spatial))
        else:
            out = first.new_empty((size, *spatial, channels)).movedim(-1, 1)
        statistics: list[Tensor] = []
        for at, part in _ranges(parts):
            statistics += _group_norm.forward_into(
                out[:, at], part, part.shape[1] // per_group, _of(weight, at), _of(bias, at), eps, act
            )
        ctx.per_group, ctx.eps, ctx.act = per_group, eps, act
        ctx.save_for_backward(weight, bias, *parts, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, bias, *saved = ctx.saved_tensors
        count, several = len(saved) // 3, core.batched(g)
        grads: list[Tensor | None] = []
        for i, (at, part) in enumerate(_ranges(saved[:count])):
            if not ctx.needs_input_grad[5 + i]:
                grads.append(None)
                continue
            rest: tuple[Any, ...] = (
                part, *saved[count + 2 * i : count + 2 * i + 2], part.shape[1] // ctx.per_group, _of(weight, at),
                _of(bias, at), None, None, ctx.eps, ctx.act, [True, False, False],
            )  # fmt: skip
            if several:
                grads.append(torch.ops.gas_engine.group_norm_silu_backward(g[:, at], *rest)[0])
                continue
            piece, into = g[:, at], None
            if not _group_norm.samples_apart(piece, part):
                # A copy, of one sample too: its memory takes the gradient, and bytes are affine in the batch.
                piece = into = piece.clone(memory_format=core.layout(part))
            grads.append(_group_norm.gradients(piece, *rest, into=into)[0])  # type: ignore[misc]
        return (None,) * 5 + tuple(grads)


def _of(t: Tensor | None, at: slice) -> Tensor | None:
    return None if t is None else t[at]


def _ranges(parts: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Each part with its channels in the whole."""
    start = 0
    for part in parts:
        yield slice(start, start + part.shape[1]), part
        start += part.shape[1]
