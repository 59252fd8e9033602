"""`geglu` and `silu_mul`: the gated linear units of transformer feed-forwards, which keep their input once.

Shapes: the halves of [..., 2D], or two tensors [..., D]; result [..., D].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _native as core
from ._samples import Sample, draw
from .reference import geglu_reference, silu_mul_reference

__all__ = ["geglu", "silu_mul"]


def geglu(x: Tensor, approximate: str = "none") -> Tensor:
    """GEGLU of a projection: its first half times the gelu of its second half.

    y = x[..., :D] * gelu(x[..., D:])   (arXiv 2002.05202; the order of the halves is diffusers').

    Shapes and dtypes: x [..., 2D] float32, float64, bfloat16 or float16 -> [..., D]; arithmetic in float32 (float64).
    `approximate` "none" (by the error function) or "tanh". Differentiable once.
    Error against the float64 twin, relative L2 (bias over norm): float32 7e-8 (< 1e-9), bfloat16 1.7e-3, float16 2e-4.
    Memory: keeps x (2D a row) where PyTorch keeps x and the gelu's output (3D); forward reads 2D and writes D, backward
    reads 3D and writes 2D: one pass each, no temporary.
    Raises: ValueError (odd width, unknown approximation) or TypeError (dtype), with the value seen.

        hidden = geglu(projection(x))            # in place of value, gate = h.chunk(2, -1); value * gelu(gate)
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}")
    _check_halves("geglu", x)
    if not core.runs_on(x):
        return geglu_reference(x, approximate)
    return _glu(x, core.ACTIVATIONS["gelu" if approximate == "none" else "gelu_tanh"], False)


def silu_mul(gate: Tensor, value: Tensor | None = None) -> Tensor:
    """SwiGLU's product: silu(gate) * value, of two tensors or of the halves of one, gate first.

    y = gate * sigmoid(gate) * value   (arXiv 2002.05202).

    Shapes and dtypes: gate, value [..., D], or gate [..., 2D] alone -> [..., D]; see `geglu`, also for memory and
    errors (keeps gate and value, where PyTorch keeps silu's output besides). Differentiable once.

        hidden = silu_mul(gate_projection(x), value_projection(x))
        hidden = silu_mul(projection(x))         # halves of one projection, the gate first
    """
    if value is None:
        _check_halves("silu_mul", gate)
        if not core.runs_on(gate):
            return silu_mul_reference(gate)
        return _glu(gate, core.ACTIVATIONS["silu"], True)
    checks.check_list("silu_mul", "(gate, value)", (gate, value))
    checks.check_states("silu_mul", "(gate, value)", (gate, value))
    if gate.dtype != value.dtype:
        raise TypeError(f"silu_mul: gate and value must have one dtype, got {gate.dtype} and {value.dtype}")
    if not core.runs_on(gate):
        return silu_mul_reference(gate, value)
    return _glu_pair(gate, value, core.ACTIVATIONS["silu"])


def _check_halves(op: str, x: Tensor) -> None:
    checks.check_list(op, "(x,)", (x,))
    checks.check_states(op, "x", (x,))
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"{op}: the last dimension holds two halves, so it must be even, got {list(x.shape)}")


def _rows(t: Tensor) -> Tensor:
    """[rows, D] with dense rows: a view wherever the strides allow one, as for the halves of a projection."""
    width = t.shape[-1] if t.dim() else 1
    if t.numel() == 0:
        return t.reshape(-1, max(width, 1))
    try:
        rows = t.view(-1, width)
    except RuntimeError:
        rows = t.contiguous().view(-1, width)
    return rows if width == 1 or rows.stride(1) == 1 else rows.contiguous()


_kernel = core.kernel("glu")


def _launch(
    act: int, gate: Tensor, value: Tensor, out: Tensor | None, grad: Tensor | None = None, d: tuple[Tensor, ...] = ()
) -> None:
    """The kernel over rows; where all are dense there is but one long row."""
    rows, width = gate.shape
    tensors = [gate, value, *d]
    strides = [t.stride(0) for t in tensors] + ([] if d else [0, 0])
    if all(t.is_contiguous() for t in tensors):
        rows, width = 1, rows * width
    if width == 0:
        return
    _kernel(gate, gate, act, gate, value, *strides[:2], grad, out, *(d or (None, None)), *strides[2:], rows, width)


def _split(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """gate and value of rows [rows, 2D], as views."""
    first, second = x.tensor_split(2, dim=1)
    return (first, second) if gate_first else (second, first)


def _halves(x: Tensor, act: int, gate_first: bool) -> Tensor:
    out = _halves_fake(x, act, gate_first)
    _launch(act, *_split(_rows(x), gate_first), out)
    return out


def _halves_fake(x: Tensor, act: int, gate_first: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _halves_backward(g: Tensor, x: Tensor, act: int, gate_first: bool) -> Tensor:
    d_x = _halves_backward_fake(g, x, act, gate_first)
    d_rows = d_x.view(_rows(x).shape)
    _launch(act, *_split(_rows(x), gate_first), None, g.contiguous(), _split(d_rows, gate_first))
    return d_x


def _halves_backward_fake(g: Tensor, x: Tensor, act: int, gate_first: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _pair(gate: Tensor, value: Tensor, act: int) -> Tensor:
    out = _pair_fake(gate, value, act)
    _launch(act, _rows(gate), _rows(value), out)
    return out


def _pair_fake(gate: Tensor, value: Tensor, act: int) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _pair_backward(g: Tensor, gate: Tensor, value: Tensor, act: int) -> tuple[Tensor, Tensor]:
    d_gate, d_value = _pair_backward_fake(g, gate, value, act)
    rows = [_rows(t) for t in (gate, value, d_gate, d_value)]
    _launch(act, rows[0], rows[1], None, g.contiguous(), (rows[2], rows[3]))
    return d_gate, d_value


def _pair_backward_fake(g: Tensor, gate: Tensor, value: Tensor, act: int) -> tuple[Tensor, Tensor]:
    return _pair_fake(gate, value, act), _pair_fake(value, gate, act)


def _setup_halves(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.act, ctx.gate_first = inputs
    ctx.save_for_backward(x)


def _derivative_halves(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    return _glu_backward(g, *ctx.saved_tensors, ctx.act, ctx.gate_first), None, None


def _setup_pair(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, value, ctx.act = inputs
    ctx.save_for_backward(gate, value)


def _derivative_pair(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_glu_pair_backward(g, *ctx.saved_tensors, ctx.act), None


_glu = core.register(
    "glu(Tensor x, int act, bool gate_first) -> Tensor", _halves, _halves_fake, _derivative_halves, _setup_halves
)
_glu_backward = core.register(
    "glu_backward(Tensor g, Tensor x, int act, bool gate_first) -> Tensor", _halves_backward, _halves_backward_fake
)
_glu_pair = core.register(
    "glu_pair(Tensor gate, Tensor value, int act) -> Tensor", _pair, _pair_fake, _derivative_pair, _setup_pair
)
_glu_pair_backward = core.register(
    "glu_pair_backward(Tensor g, Tensor gate, Tensor value, int act) -> (Tensor, Tensor)",
    _pair_backward,
    _pair_backward_fake,
)


def geglu_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """Odd widths, batches, a transposed and an empty input, both approximations."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((0, 4), (2,), (3, 6), (2, 129, 8), (1, 5, 1134)):
        yield Sample((draw(generator, shape, dtype, device, requires_grad),))
    yield Sample((draw(generator, (3, 5, 6), dtype, device, requires_grad),), {"approximate": "tanh"})
    x = draw(generator, (6, 5, 4), dtype, device, requires_grad)
    yield Sample((x.detach().movedim(0, 2).requires_grad_(requires_grad),))


def silu_mul_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """Two tensors, halves of one, one tensor alone."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((0, 4), (1,), (3, 3), (2, 129, 4), (1134,)):
        yield Sample(tuple(draw(generator, shape, dtype, device, requires_grad) for _ in range(2)))
    yield Sample((draw(generator, (2, 3, 6), dtype, device, requires_grad),))
    halves = draw(generator, (2, 5, 14), dtype, device).chunk(2, -1)
    yield Sample(tuple(t.requires_grad_(requires_grad) for t in halves))
