"""The kernels of `group_norm_silu` as functions of tensors: checks, layouts, workspaces, and what is not there.

B batch, C channels, G groups, N pixels; x [B, C, *].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _native as core
from .reference import accumulation_dtype

__all__ = [
    "backward", "backward_fake", "check", "forward", "forward_alone", "forward_fake", "forward_into", "gradients",
]  # fmt: skip


def check(x: Tensor, num_groups: int, act: str, *small: Tensor | None) -> None:
    """What must hold before a pointer is taken, also for whoever calls `torch.ops.gas_engine`."""
    shape, device = x.shape, x.device
    if len(shape) < 2:
        raise ValueError(f"group_norm_silu: x must be [B, C, ...], got {list(shape)}")
    if act not in core.ACTIVATIONS:
        raise ValueError(f"group_norm_silu: act must be one of {', '.join(core.ACTIVATIONS)}, got {act!r}")
    B, C = shape[0], shape[1]
    if num_groups < 1 or C % num_groups != 0:
        raise ValueError(f"group_norm_silu: num_groups must divide the channels, got {num_groups} for {C} channels")
    if x.dtype not in checks.DTYPES:
        raise TypeError(f"group_norm_silu: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    per_channel, per_sample = (C,), (B, C)
    for name, t, wanted in zip(_SMALL, small, (per_channel, per_channel, per_sample, per_sample), strict=True):
        if t is None:
            continue
        if t.shape != wanted:
            raise ValueError(f"group_norm_silu: {name} must have shape {list(wanted)}, got {list(t.shape)}")
        if t.device != device:
            raise ValueError(f"group_norm_silu: all tensors must be on {device}, got {name} on {t.device}")
        if t.dtype not in checks.DTYPES:
            raise TypeError(f"group_norm_silu: {name} must be float32, float64, bfloat16 or float16, got {t.dtype}")


_SMALL = ("weight", "bias", "scale", "shift")


def _rows(t: Tensor) -> Tensor:
    """A small vector whose rows are dense: a half of `emb.chunk(2, dim=1)` may stay where it is."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _chunks(B: int, C: int, N: int, G: int, itemsize: int, last: bool, backward: bool) -> tuple[int, int, int]:
    """How the CUDA kernels split their sums, by sizes alone: (length of a chunk, chunks, sums in all)."""
    if last:  # over pixels, for each channel; see Tiles in group_norm_silu.cuh
        pack = 16 // itemsize
        columns = min(64, 1 << (-(-C // pack) - 1).bit_length())
        depth, tiles = 256 // columns, B * -(-C // (columns * pack))
        # A few hundred blocks, whose threads have some pixels each.
        length = max(4 * depth, -(-N * tiles // (512 * depth)) * depth)
        chunks = -(-N // length)
        return length, chunks, B * C * chunks
    span, rows = (N, B * C) if backward else (N * (C // G), B * G)  # over a channel, or over a group
    length = 1024 if span * rows < 2**24 else 4096
    chunks = -(-span // length)
    return length, chunks, rows * chunks


_KERNELS = {"forward": core.kernel("group_norm_silu"), "backward": core.kernel("group_norm_silu_backward")}


def _launch(
    way: str,
    x: Tensor,
    num_groups: int,
    small: tuple[Tensor | None, ...],
    eps: float,
    act: str,
    statistics: tuple[Tensor | None, Tensor | None],
    out: Tensor | None,
    g: Tensor | None = None,
    dscale: Tensor | None = None,
    dshift: Tensor | None = None,
) -> None:
    """Run the kernel on a dense x; g, dscale and dshift are the backward pass's."""
    shape, elements = x.shape, x.numel()
    B, C = shape[0], shape[1]
    N = elements // (B * C)
    last = N == 1 or not x.is_contiguous()  # one pixel: both layouts are one, this one has vectors
    weight, bias, scale, shift = [t if t is None else _rows(t) for t in small]
    workspace, length, chunks = None, 0, 0  # the host path needs none
    if x.is_cuda:
        length, chunks, sums = _chunks(B, C, N, num_groups, x.element_size(), last, way == "backward")
        workspace = x.new_empty(2 * (sums + B * num_groups), dtype=accumulation_dtype(x.dtype))
    _KERNELS[way](
        x,
        *(x, x),
        *(weight, weight),
        *(bias, bias),
        *(scale, scale, 0 if scale is None else scale.stride(0)),
        *(shift, shift, 0 if shift is None else shift.stride(0)),
        *(core.ACTIVATIONS[act], eps, last),
        *(B, C, num_groups, N),
        *(length, chunks, workspace),
        *statistics,
        *(out, 0 if out is None else out.stride(0)),
        *(g, 0 if g is None else g.stride(0)),
        *(dscale, dshift),
    )


def _statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], num_groups), dtype=accumulation_dtype(x.dtype))
    return mean, torch.empty_like(mean)


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    small = (weight, bias, scale, shift)
    check(x, num_groups, act, *small)
    mean, rstd = _statistics(x, num_groups)
    return _run_forward(x, num_groups, small, eps, act, (mean, rstd)), mean, rstd


def forward_alone(x: Tensor, num_groups: int, *rest: Any) -> Tensor:
    """Without the statistics, which kernels of a device pass through memory all the same."""
    *small, eps, act = rest
    check(x, num_groups, act, *small)
    return _run_forward(x, num_groups, (*small,), eps, act, _statistics(x, num_groups) if x.is_cuda else (None, None))


def _run_forward(
    x: Tensor,
    num_groups: int,
    small: tuple[Tensor | None, ...],
    eps: float,
    act: str,
    statistics: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """The forward kernel, on tensors that have been checked."""
    x = x.contiguous(memory_format=core.layout(x))
    out = torch.empty_like(x)
    if x.numel() > 0:
        _launch("forward", x, num_groups, small, eps, act, statistics, out)
    else:
        for t in statistics:
            if t is not None:
                t.zero_()
    return out


def forward_into(
    out: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor]:
    """The statistics; `out` is some channels of a dense tensor, and takes the result."""
    if not samples_apart(out, x):
        op = torch.ops.gas_engine.group_norm_silu
        result, mean, rstd = op(x, num_groups, weight, bias, None, None, eps, act)
        out.copy_(result)
        return mean, rstd
    small = (weight, bias, None, None)
    check(x, num_groups, act, *small)
    mean, rstd = _statistics(x, num_groups)
    if x.numel() > 0 and not _is_fake(x):
        _launch("forward", x, num_groups, small, eps, act, (mean, rstd), out)
    return mean, rstd


def samples_apart(t: Tensor, x: Tensor) -> bool:
    """Whether the kernels can work on some channels of a dense tensor where they lie, with a dense x beside them.

    Those of the host can, as long as it is the samples that lie apart, and not their pixels.
    """
    pixels = x.shape[2:].numel()
    return x.is_cpu and x.is_contiguous() and t.dtype == x.dtype and pixels > 1 and t.stride()[1:] == x.stride()[1:]


def _is_fake(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, torch._subclasses.FakeTensor)


def forward_fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check(x, num_groups, act, weight, bias, scale, shift)
    return torch.empty_like(x, memory_format=core.layout(x)), *_statistics(x, num_groups)


def _gradients(
    g: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, wanted: list[bool], into: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dscale and dshift, empty, where they are wanted."""
    if g.shape != x.shape:
        raise ValueError(f"group_norm_silu: its cotangent must have the shape {list(x.shape)}, got {list(g.shape)}")
    return (
        None if not wanted[0] else into if into is not None else torch.empty_like(x, memory_format=core.layout(x)),
        scale.new_empty(x.shape[:2]) if wanted[1] and scale is not None else None,
        shift.new_empty(x.shape[:2]) if wanted[2] and shift is not None else None,
    )


def _some(x: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What a registered op may return: no elements where nothing was wanted."""
    return tuple(x.new_empty(0) if t is None else t for t in grads)


def gradients(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    act: str,
    wanted: list[bool],
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dscale and dshift, each where it is wanted.

    `into` takes dx and may be a dense x or g: the last pass reads an element of both before it writes that of dx.
    """
    small = (weight, bias, scale, shift)
    check(x, num_groups, act, *small)
    dx, dscale, dshift = grads = _gradients(g, x, scale, shift, wanted, into)
    if _is_fake(x):
        return grads
    if x.numel() == 0:
        for t in grads:
            if t is not None:
                t.zero_()
        return grads
    layout = core.layout(x)
    x, g = x.contiguous(memory_format=layout), g.to(x.dtype)
    g = g if samples_apart(g, x) else g.contiguous(memory_format=layout)
    statistics = (mean.contiguous(), rstd.contiguous())
    _launch("backward", x, num_groups, small, eps, act, statistics, dx, g, dscale, dshift)
    return grads


def backward(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _some(x, gradients(g, x, *rest))


def backward_fake(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    act: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    check(x, num_groups, act, weight, bias, scale, shift)
    return _some(x, _gradients(g, x, scale, shift, wanted))
