"""The kernels of `group_norm_silu` as functions of tensors: checks, layouts, workspaces, and what is not there.

B batch, C channels, G groups, N pixels; x [B, C, *].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native as core
from .reference import accumulation_dtype

__all__ = ["backward", "backward_fake", "check", "forward", "forward_fake"]


def check(x: Tensor, num_groups: int, act: str, *small: Tensor | None) -> None:
    """What must hold before a pointer is taken, also for whoever calls `torch.ops.gas_engine`."""
    if x.dim() < 2:
        raise ValueError(f"group_norm_silu: x must be [B, C, ...], got {list(x.shape)}")
    if act not in core.ACTIVATIONS:
        raise ValueError(f"group_norm_silu: act must be one of {', '.join(core.ACTIVATIONS)}, got {act!r}")
    B, C = x.shape[:2]
    if num_groups < 1 or C % num_groups != 0:
        raise ValueError(f"group_norm_silu: num_groups must divide the channels, got {num_groups} for {C} channels")
    names = ("weight", "bias", "scale", "shift")
    for name, t, shape in zip(names, small, ((C,), (C,), (B, C), (B, C)), strict=True):
        if t is not None and t.shape != shape:
            raise ValueError(f"group_norm_silu: {name} must have shape {list(shape)}, got {list(t.shape)}")
        if t is not None and t.device != x.device:
            raise ValueError(f"group_norm_silu: all tensors must be on {x.device}, got {name} on {t.device}")
    for name, t in zip(("x", *names), (x, *small), strict=True):
        if t is not None and t.dtype not in core.DTYPES:
            raise TypeError(f"group_norm_silu: {name} must be float32, float64, bfloat16 or float16, got {t.dtype}")


def _layout(x: Tensor) -> torch.memory_format:
    """The layout the op works in: the input's own where it is dense."""
    other = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if other is not None and not x.is_contiguous() and x.is_contiguous(memory_format=other):
        return other
    return torch.contiguous_format


def _rows(t: Tensor | None) -> Tensor | None:
    """A small vector whose rows are dense: a half of `emb.chunk(2, dim=1)` may stay where it is."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _field(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (core.DTYPES[t.dtype], t.data_ptr())


def _chunks(B: int, C: int, N: int, G: int, last: bool, backward: bool) -> tuple[int, int, int]:
    """How the CUDA kernels split their sums, by sizes alone: (length of a chunk, chunks, sums in all)."""
    if last:  # over pixels, for each channel
        length = 64 if N * B * C < 2**24 else 256
        chunks = -(-N // length)
        return length, chunks, B * C * chunks
    span, rows = (N, B * C) if backward else (N * (C // G), B * G)  # over a channel, or over a group
    length = 1024 if span * rows < 2**24 else 4096
    chunks = -(-span // length)
    return length, chunks, rows * chunks


def _launch(
    op: str,
    x: Tensor,
    layout: torch.memory_format,
    num_groups: int,
    small: tuple[Tensor | None, ...],
    eps: float,
    act: str,
    statistics: tuple[Tensor, Tensor],
    *outputs: Tensor | None,
) -> None:
    """Run the kernel on a dense x; outputs are out, or dx, g, dscale, dshift."""
    if x.numel() == 0:
        for t in statistics:
            t.zero_()
        return
    B, C = x.shape[:2]
    N = x.numel() // (B * C)
    last = layout != torch.contiguous_format or N == 1  # one pixel: both layouts are one, this one has vectors
    weight, bias, scale, shift = (_rows(t) for t in small)  # bound to names: their memory must outlive the call
    workspace, length, chunks = None, 0, 0  # the host path needs none
    if x.is_cuda:
        length, chunks, sums = _chunks(B, C, N, num_groups, last, op.endswith("backward"))
        workspace = statistics[0].new_empty(2 * (sums + B * num_groups))
    core.call(
        op,
        x.device,
        core.DTYPES[x.dtype],
        x.data_ptr(),
        *_field(weight),
        *_field(bias),
        *(*_field(scale), 0 if scale is None else scale.stride(0)),
        *(*_field(shift), 0 if shift is None else shift.stride(0)),
        core.ACTIVATIONS[act],
        eps,
        last,
        *(B, C, num_groups, N),
        *(length, chunks),
        core.address(workspace),
        *(t.data_ptr() for t in statistics),
        *(core.address(t) for t in (*outputs, None, None, None)[:4]),
    )


def _statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[0], num_groups), accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _forward_outputs(
    x: Tensor, num_groups: int, act: str, *small: Tensor | None
) -> tuple[torch.memory_format, Tensor, tuple[Tensor, Tensor]]:
    check(x, num_groups, act, *small)
    layout = _layout(x)
    return layout, torch.empty_like(x, memory_format=layout), _statistics(x, num_groups)


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
    layout, out, statistics = _forward_outputs(x, num_groups, act, *small)
    x = x.contiguous(memory_format=layout)
    _launch("group_norm_silu", x, layout, num_groups, small, eps, act, statistics, out)
    return out, *statistics


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
    _, out, statistics = _forward_outputs(x, num_groups, act, weight, bias, scale, shift)
    return out, *statistics


def _gradients(
    g: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dscale and dshift, empty, where they are wanted."""
    if g.shape != x.shape:
        raise ValueError(f"group_norm_silu: its cotangent must have the shape {list(x.shape)}, got {list(g.shape)}")
    return (
        torch.empty_like(x, memory_format=_layout(x)) if wanted[0] else None,
        scale.new_empty(x.shape[:2]) if wanted[1] and scale is not None else None,
        shift.new_empty(x.shape[:2]) if wanted[2] and shift is not None else None,
    )


def _some(x: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What a registered op may return: no elements where nothing was wanted."""
    return tuple(x.new_empty(0) if t is None else t for t in grads)


def _run_backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward kernel, on tensors that have been checked."""
    small = (weight, bias, scale, shift)
    dx, dscale, dshift = grads = _gradients(g, x, scale, shift, wanted)
    if x.numel() == 0:
        for t in grads:
            if t is not None:
                t.zero_()
        return grads
    layout = _layout(x)
    x, g = x.contiguous(memory_format=layout), g.to(x.dtype).contiguous(memory_format=layout)
    statistics = (mean.contiguous(), rstd.contiguous())
    _launch("group_norm_silu_backward", x, layout, num_groups, small, eps, act, statistics, dx, g, dscale, dshift)
    return grads


def backward(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, num_groups: int, *rest: Any) -> tuple[Tensor, ...]:
    *small, _, act, _ = rest
    check(x, num_groups, act, *small)
    return _some(x, _run_backward(g, x, mean, rstd, num_groups, *rest))


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
