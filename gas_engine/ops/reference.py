"""The twins: every op in plain PyTorch, differentiable by ordinary autograd, on any device.

They define what the native ops compute, and stand in where the native core is absent or switched off.
Shapes: J states of one common shape [...], coefficients [J].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "accumulation_dtype",
    "adjoint_step_reference",
    "bias_leaky_relu_reference",
    "dots_reference",
    "lincomb_reference",
    "resample2d_reference",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lincomb_reference(
    states: list[Tensor], coef: Tensor, scale: Tensor | None = None, cast: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Twin of `gas_engine.ops.lincomb`: y = sum_i coef[i] states[i], optionally also scale * y in `cast`.

    Memory: about 3J state-sized moves, and one temporary per term.
    """
    dtype = functools.reduce(torch.promote_types, (s.dtype for s in states))
    wide = accumulation_dtype(dtype)
    coef = coef.to(states[0].device, wide)
    total = coef[0] * states[0].to(wide)
    for c, state in zip(coef[1:], states[1:], strict=True):
        total = total + c * state.to(wide)
    total = total.to(dtype)
    if scale is None and cast is None:
        return total
    cast = cast or total.dtype
    wide = torch.promote_types(wide, accumulation_dtype(cast))
    scaled = total.to(wide)
    if scale is not None:
        scaled = scaled * scale.to(total.device, wide).reshape(())
    # `* 1` and not a bare cast: the two outputs never share storage, with the native op or without.
    return total, scaled.to(cast) if scaled.dtype != cast or scale is not None else scaled * 1


def dots_reference(x: Tensor, states: list[Tensor]) -> Tensor:
    """Twin of `gas_engine.ops.dots`: d[i] = <states[i], x>, float64 [J].

    Memory: J products, one alive at a time.
    """
    wide = accumulation_dtype(x.dtype)
    return torch.stack([(s.to(wide) * x.to(wide)).sum(dtype=torch.float64) for s in states])


def adjoint_step_reference(
    x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twin of `gas_engine.ops.adjoint_step`.

    mu = sum_i b[i] g[i];  g_x = sum_i a[i] g[i];  da[i] = <g[i], x>;  db[i] = <g[i], f>.

    Memory: about 10J state-sized moves, and one temporary per term.
    """
    mu, g_x = lincomb_reference(g, b), lincomb_reference(g, a)
    assert isinstance(mu, Tensor) and isinstance(g_x, Tensor)
    return mu.to(f.dtype), g_x.to(x.dtype), dots_reference(x, g), dots_reference(f, g)


def bias_leaky_relu_reference(x: Tensor, bias: Tensor | None = None, slope: float = 0.2) -> Tensor:
    """Twin of `gas_engine.ops.bias_leaky_relu`: y = v if v > 0 else slope v, v = x + bias[c].

    Memory: one temporary in the accumulation dtype, which is kept for the backward pass.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    if bias is not None:
        wide = wide + bias.to(wide.dtype).reshape(-1, *[1] * (x.dim() - 2))
    return F.leaky_relu(wide, slope).to(x.dtype)


def resample2d_reference(x: Tensor, taps: Sequence[float] | Tensor, up: int = 1, down: int = 2) -> Tensor:
    """Twin of `gas_engine.ops.resample2d`: a grouped convolution with the outer product of the taps, or its
    transpose.

    Memory: a copy of x in the accumulation dtype, which is kept for the backward pass.
    """
    f = torch.as_tensor(taps, dtype=torch.float64)
    T, C, p = len(f), x.shape[1], (len(f) - 1) // 2
    f = up * f / f.sum()
    wide = x.to(accumulation_dtype(x.dtype))
    kernel = torch.outer(f, f).to(wide).expand(C, 1, T, T)
    with torch.autocast(x.device.type, enabled=False):
        if up == 1:
            return F.conv2d(wide, kernel, stride=down, padding=p, groups=C).to(x.dtype)
        return F.conv_transpose2d(wide, kernel, stride=2, padding=p, output_padding=T % 2, groups=C).to(x.dtype)
