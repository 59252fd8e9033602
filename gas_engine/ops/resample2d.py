"""`resample2d`: images down or up by two with a separable low-pass filter, as StyleGAN and R3GAN do it.

Shapes: x [B, C, H, W], taps [T].
"""

from __future__ import annotations

import array
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _native as core
from ._samples import Sample, draw
from .reference import resample2d_reference

__all__ = ["resample2d"]

MAX_TAPS = 8  # kMaxTaps of csrc/resample2d.h


def resample2d(x: Tensor, taps: Sequence[float] | Tensor, up: int = 1, down: int = 2) -> Tensor:
    """Separable FIR filter of images, with one output for every second pixel, two for every one, or as many.

    Per axis, with f = up taps / sum(taps), padding p = (T - 1) // 2 and zeros outside of the image:

        down = 2 or 1:  y[o] = sum_k f[k] x[o down + k - p]       conv2d(x, outer(f, f), stride=down, padding=p)
        up = 2:         y[2 i + k - p] += f[k] x[i]               conv_transpose2d(..., stride=2, padding=p,
                                                                                   output_padding=T % 2)

    (Karras et al., arXiv 1912.04958, appendix B; taps [1, 3, 3, 1] are theirs). Away from the border a constant
    image stays constant.

    Shapes and dtypes: x [B, C, H, W] float32, float64, bfloat16 or float16, kept with its layout (contiguous or
    channels_last; anything else is made contiguous). taps: 1 to 8 numbers with a sum other than zero, constant.
    (up, down) is (1, 2), (2, 1) or (1, 1). y is [B, C, (H + 2p - T) // down + 1, ...], or [B, C, 2 H, 2 W]. Sums run
    in float32 (float64 where x is float64), and are rounded once.
    Error against the float64 twin with taps [1, 3, 3, 1], relative L2 (bias over norm): float32 6e-8 (< 5e-10),
    bfloat16 1.7e-3 and float16 2.1e-4 (the rounding of the result; < 5e-6 and < 1e-6).
    Differentiable any number of times: the op is linear and its transpose is the same op.
    Memory: reads x once, writes y once; nothing is kept for the backward pass. A tensor of taps on a device is
    copied to the host, which waits for it: pass numbers.
    Raises: ValueError (shapes, taps, factors) or TypeError (dtypes), with the value seen.

        x = torch.randn(8, 384, 32, 32)
        half = resample2d(x, [1, 3, 3, 1])                  # [8, 384, 16, 16]
        twice = resample2d(x, [1, 3, 3, 1], up=2, down=1)   # [8, 384, 64, 64]
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"resample2d: x must be a tensor, got {type(x).__name__}")
    filter_ = normalised(taps)
    T, height, width, p = len(filter_), *out_size(x, len(filter_), up, down)
    if not core.runs_on(x):
        return resample2d_reference(x, taps, up, down)
    if up == 2:
        filter_, p = [2 * f for f in reversed(filter_)], T - 1 - p
    return _op(x, filter_, up, down, p, height, width)


def normalised(taps: Sequence[float] | Tensor) -> list[float]:
    """The taps as float64 numbers with sum 1."""
    if isinstance(taps, str):
        raise TypeError(f"resample2d: taps must be numbers, got {taps!r}")
    if isinstance(taps, Tensor):
        if torch.compiler.is_compiling():
            raise TypeError("resample2d: under torch.compile taps must be numbers, not a tensor: pass taps.tolist()")
        if taps.requires_grad:
            raise ValueError("resample2d: taps must be constant, got a tensor that requires a gradient: detach it")
        if taps.dim() != 1:
            raise ValueError(f"resample2d: taps must be one-dimensional, got {list(taps.shape)}")
        taps = taps.tolist()
    values = [float(t) for t in taps]
    if not 1 <= len(values) <= MAX_TAPS:
        raise ValueError(f"resample2d: taps must be 1 to {MAX_TAPS} numbers, got {len(values)}")
    total = math.fsum(values)
    if not math.isfinite(total) or total == 0:
        raise ValueError(f"resample2d: taps must have a finite sum other than zero, got {values}")
    return [v / total for v in values]


def out_size(x: Tensor, T: int, up: int, down: int) -> tuple[Any, Any, int]:
    """Height and width of the result, and the padding; refuses what has none."""
    if x.dtype not in checks.DTYPES:
        raise TypeError(f"resample2d: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"resample2d: x must be [B, C, H, W], got {list(x.shape)}")
    if (up, down) not in ((1, 2), (2, 1), (1, 1)):
        raise ValueError(f"resample2d: (up, down) must be (1, 2), (2, 1) or (1, 1), got {(up, down)}; up needs down=1")
    H, W = x.shape[2:]
    p = (T - 1) // 2
    if up == 2:
        return 2 * H, 2 * W, p
    if H + 2 * p < T or W + 2 * p < T:
        raise ValueError(f"resample2d: images must be at least {T - 2 * p} pixels wide and high, got {[H, W]}")
    return (H + 2 * p - T) // down + 1, (W + 2 * p - T) // down + 1, p


def resample2d_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """All numbers of taps and factors, odd sizes, planes small and large, few and many channels, both layouts."""
    generator = torch.Generator().manual_seed(0)
    taps = [0.4, 1.0, 3.0, 2.5, -0.5, 0.7, 0.1, 0.3]  # no symmetry that would hide a flip
    shapes = [(2, 3, 5, 7), (1, 1, 1, 5), (1, 2, 129, 3), (1, 20, 8, 8), (2, 9, 3, 1), (1, 2, 33, 70), (0, 3, 4, 4)]
    for T in range(1, len(taps) + 1):
        for shape in shapes:
            if T % 2 == 0 and min(shape[2:]) == 1:  # refused
                continue
            for layout in (torch.contiguous_format, torch.channels_last):
                x = draw(generator, shape, dtype, device, requires_grad, layout)
                for up, down in ((1, 2), (2, 1), (1, 1)):
                    yield Sample((x, taps[:T]), {"up": up, "down": down})
    yield Sample((draw(generator, (1, 2, 1, 1), dtype, device, requires_grad), [1, 3, 3, 1]), {"up": 2, "down": 1})
    for layout in (torch.contiguous_format, torch.channels_last):
        x = draw(generator, (1, 2, 3, 1134), dtype, device, requires_grad, layout)
        for T in (2, 4):
            yield from (Sample((x, taps[:T]), {"up": up, "down": down}) for up, down in ((1, 2), (2, 1), (1, 1)))


def _prepare(
    x: Tensor, taps: Sequence[float], up: int, down: int, pad: int, out_h: int, out_w: int
) -> tuple[Tensor, Tensor]:
    """Checked x in a dense layout, and the empty result in the same."""
    if x.dtype not in checks.DTYPES or x.dim() != 4:
        raise ValueError(f"resample2d: x must be floating [B, C, H, W], got {x.dtype} {list(x.shape)}")
    if not 1 <= len(taps) <= MAX_TAPS or not 0 <= pad < len(taps):
        raise ValueError(f"resample2d: 1 to {MAX_TAPS} taps and 0 <= pad < taps wanted, got {len(taps)} and {pad}")
    if up not in (1, 2) or down not in (1, 2) or out_h < 0 or out_w < 0:
        raise ValueError(f"resample2d: factors 1 or 2 and sizes wanted, got {up}, {down} and {[out_h, out_w]}")
    (x,), layout = core.one_layout([x])
    B, C, _, _ = x.shape
    return x, torch.empty(B, C, out_h, out_w, dtype=x.dtype, device=x.device, memory_format=layout)


_kernel = core.kernel("resample2d")


def _resample2d(x: Tensor, taps: Sequence[float], up: int, down: int, pad: int, out_h: int, out_w: int) -> Tensor:
    x, y = _prepare(x, taps, up, down, pad, out_h, out_w)
    B, C, H, W = x.shape
    if y.numel() == 0:
        return y
    if x.numel() == 0:
        return y.zero_()
    planes, inner = (B * C, 1) if x.is_contiguous() and y.is_contiguous() else (B, C)
    numbers = array.array("d", taps)
    taps_at = numbers.buffer_info()[0]
    _kernel(x, x, x, y, taps_at, len(taps), up, down, pad, planes, H, W, out_h, out_w, inner)
    return y


def _fake(x: Tensor, taps: Sequence[float], up: int, down: int, pad: int, out_h: int, out_w: int) -> Tensor:
    return _prepare(x, taps, up, down, pad, out_h, out_w)[1]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.taps, ctx.up, ctx.down, ctx.pad = inputs[:5]
    ctx.size = x.shape[2:]


def _transpose(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    taps = list(reversed(ctx.taps))
    dx = _op(g, taps, ctx.down, ctx.up, len(taps) - 1 - ctx.pad, *ctx.size)
    return dx, None, None, None, None, None, None


def _vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    assert in_dims[0] is not None  # the one tensor is the mapped one
    x = x.movedim(in_dims[0], 0)
    return torch.ops.gas_engine.resample2d(x.flatten(0, 1), *rest).unflatten(0, x.shape[:2]), 0


_op = core.register(
    "resample2d(Tensor x, float[] taps, int up, int down, int pad, SymInt out_h, SymInt out_w) -> Tensor",
    _resample2d,
    _fake,
    _transpose,
    _setup,
    _vmap,
)
