"""The twins: every op in plain PyTorch, differentiable by ordinary autograd, on any device.

They define what the native ops compute, and stand in where the native core is absent or switched off.
Shapes: J states of one common shape [...], coefficients [J].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "accumulation_dtype",
    "activation_reference",
    "adjoint_step_reference",
    "bias_leaky_relu_reference",
    "conv_frozen_reference",
    "dots_reference",
    "geglu_reference",
    "group_norm_silu_reference",
    "lincomb_reference",
    "resample2d_reference",
    "reversible_inverse_reference",
    "reversible_step_reference",
    "silu_mul_reference",
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


def conv_frozen_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> Tensor:
    """Twin of `gas_engine.ops.conv_frozen`: PyTorch's convolution, which keeps x."""
    kind = f"conv_transpose{x.dim() - 2}d" if transposed else f"conv{x.dim() - 2}d"
    rest = (output_padding, groups, dilation) if transposed else (dilation, groups)
    return getattr(F, kind)(x, weight, bias, stride, padding, *rest)


ESCAPE = -128  # the code of an element whose distance does not fit; kEscape in csrc/reversible.h
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
_INTEGERS[torch.float16] = torch.int16


def _ordered(x: Tensor) -> Tensor:
    """The floats of a type numbered in their order, int64."""
    bits = x.detach().contiguous().view(_INTEGERS[x.dtype])
    magnitude = torch.iinfo(bits.dtype).max
    return (bits ^ ((bits >> (8 * bits.element_size() - 1)) & magnitude)).long()


def _previous(x_next: Tensor, x: Tensor, f: Tensor, coef: Tensor) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    _, a, b = coef.to(x.device, wide).unbind()
    return ((x_next.to(wide) - a * x.to(wide) - b * f.to(wide)) / coef[0].to(x.device, wide)).to(x.dtype)


def reversible_step_reference(x_prev: Tensor, x: Tensor, f: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of the kernel under `gas_engine.ops.reversible_step`: x_next, and int8 codes with -128 for an escape.

    x_next = coef[0] x_prev + coef[1] x + coef[2] f;  code = ordered(x_prev) - ordered(inverse of the rounded x_next).
    """
    x_next = lincomb_reference([x_prev, x, f], coef)
    assert isinstance(x_next, Tensor)
    x_next = x_next.to(x.dtype)
    with torch.no_grad():
        difference = _ordered(x_prev) - _ordered(_previous(x_next, x, f, coef))
        code = torch.where(difference.abs() < -ESCAPE, difference, ESCAPE).to(torch.int8)
    return x_next, code


def reversible_inverse_reference(x_next: Tensor, x: Tensor, f: Tensor, coef: Tensor, code: Tensor) -> Tensor:
    """Twin of the kernel under `gas_engine.ops.reversible_inverse`: x_prev, except where the code is an escape.

    The value is the exact one; the derivative that of x_prev = (x_next - coef[1] x - coef[2] f) / coef[0].
    """
    guess = _previous(x_next, x, f, coef)
    integer = _INTEGERS[x.dtype]
    order = (_ordered(guess) + code).to(integer)
    magnitude = torch.iinfo(integer).max
    exact = (order ^ ((order >> (8 * order.element_size() - 1)) & magnitude)).view(x.dtype)
    return exact + (guess - guess.detach()) if guess.requires_grad else exact


def geglu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """Twin of `gas_engine.ops.geglu`: value * gelu(gate), value and gate the halves of the last dimension."""
    value, gate = x.to(accumulation_dtype(x.dtype)).chunk(2, -1)
    return (value * F.gelu(gate, approximate=approximate)).to(x.dtype)


def silu_mul_reference(gate: Tensor, value: Tensor | None = None) -> Tensor:
    """Twin of `gas_engine.ops.silu_mul`: silu(gate) * value; without value, of the halves of gate."""
    wide = gate.to(accumulation_dtype(gate.dtype))
    wide, other = wide.chunk(2, -1) if value is None else (wide, value.to(wide.dtype))
    return (F.silu(wide) * other).to(gate.dtype)


def activation_reference(y: Tensor, act: str) -> Tensor:
    """The activations of the fused ops, by the names they take: none, silu, gelu (exact), gelu_tanh."""
    if act == "silu":
        return F.silu(y)
    if act == "gelu":
        return F.gelu(y)
    if act == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if act != "none":
        raise ValueError(f"act must be 'silu', 'gelu', 'gelu_tanh' or 'none', got {act!r}")
    return y


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """Twin of `gas_engine.ops.group_norm_silu`: act(z (1 + scale) + shift), z = GroupNorm(x) weight + bias.

    Shapes: x [B, C, *], weight and bias [C], scale and shift [B, C] or [B, C, 1, ...]; here weight and bias may
    be trained. Memory: about 12 moves of x, and keeps three tensors of its size.
    """
    wide = accumulation_dtype(x.dtype)

    def spread(v: Tensor) -> Tensor:
        return v.to(wide).reshape(*v.shape[:2], *(1 for _ in x.shape[2:]))

    weight, bias = (None if v is None else v.to(wide) for v in (weight, bias))
    y = x.to(wide)
    if x.numel() > x.shape[0] * num_groups:
        y = F.group_norm(y, num_groups, weight, bias, eps)
    else:  # torch refuses groups of one number, whose n is zero, or of none
        y = y - y
        y = y if weight is None else y * spread(weight[None])
        y = y if bias is None else y + spread(bias[None])
    if scale is not None:
        y = y * (1 + spread(scale))
    if shift is not None:
        y = y + spread(shift)
    return activation_reference(y, act).to(x.dtype)


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
