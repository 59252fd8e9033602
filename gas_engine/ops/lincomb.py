"""`lincomb`: the one move of every multistep solver, x+ = sum_i coef[i] states[i], in one pass over memory.

Shapes: J states of one shape [...], coef [J].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import _native as core
from .adjoint import dots
from .reference import lincomb_reference

__all__ = ["lincomb"]


@overload
def lincomb(states: Sequence[Tensor], coef: Tensor) -> Tensor: ...
@overload
def lincomb(
    states: Sequence[Tensor], coef: Tensor, scale: Tensor, cast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]: ...
@overload
def lincomb(
    states: Sequence[Tensor], coef: Tensor, scale: Tensor | None = None, *, cast: torch.dtype
) -> tuple[Tensor, Tensor]: ...


def lincomb(
    states: Sequence[Tensor], coef: Tensor, scale: Tensor | None = None, cast: torch.dtype | None = None
) -> Any:
    """The linear combination of J states, and optionally its scaled copy in the network's dtype.

    y = sum_i coef[i] states[i], the tableau row x[n+1] = sum_j A[n,j] x[j] + B[n,j] F[j] of a multistep
    solver (arXiv 2510.17699, section 3). With `scale` or `cast`: also z = scale * y, rounded from the
    *stored* y, so that a later scale * y rebuilds z bit for bit.

    Shapes and dtypes: states J tensors [...] of one dtype (float32, float64, bfloat16, float16) and device,
    J from 1 to 64; coef [J] and scale (one element) floating, on any device (a host tensor beside CUDA states
    is copied to the device, without a wait); y like states[0], z the same in dtype `cast` (default: its own).
    Sums run in float32, or float64 for float64 states. Differentiable in all tensors, any number of times.
    Memory: reads each state once, writes y (and z) once: J+1 (J+2) state-sized moves, no temporary; states
    that share no dense layout are first copied. The backward pass keeps only what the asked gradients need.
    Raises: ValueError (shapes, devices, lengths) or TypeError (dtypes), with the value seen.

        x, f = torch.randn(2, 4, 3, 32, 32)
        x_next = lincomb([x, f], torch.tensor([0.9, -0.1]))
        x_next, net_in = lincomb([x, f], coef, scale=c_in, cast=torch.bfloat16)
    """
    if scale is None and cast is None and core.direct(*states, coef):
        return _lincomb(list(states), core.coefficients(coef, states[0].device))
    core.check_list("lincomb", "states", states)
    core.check_coef("lincomb", "coef", coef, len(states))
    if scale is not None and (not isinstance(scale, Tensor) or scale.numel() != 1 or not scale.is_floating_point()):
        seen = f"{scale.dtype} {list(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
        raise ValueError(f"lincomb: scale must be a floating tensor of one element, got {seen}")
    if cast is not None and cast not in core.DTYPES:
        raise TypeError(f"lincomb: cast must be float32, float64, bfloat16 or float16, got {cast}")
    device = states[0].device
    if not core.runs_on(device):
        core.check_states("lincomb", "states", states)
        return lincomb_reference(list(states), coef, scale, cast)
    coef = core.coefficients(coef, device)
    if scale is None and cast is None:
        return torch.ops.gas_engine.lincomb(list(states), coef)
    scale = core.coefficients(scale if scale is not None else torch.ones(1, device=device), device)
    return torch.ops.gas_engine.lincomb_cast(list(states), coef, scale, cast or states[0].dtype)


core.LIBRARY.define("lincomb(Tensor[] states, Tensor coef) -> Tensor")
core.LIBRARY.define("lincomb_cast(Tensor[] states, Tensor coef, Tensor scale, ScalarType dtype) -> (Tensor, Tensor)")


def _prepare(states: Sequence[Tensor], coef: Tensor, *scale: Tensor) -> tuple[list[Tensor], Tensor]:
    """Checked states in one layout, and the empty result."""
    core.check_states("lincomb", "states", states)
    core.check_coef("lincomb", "coef", coef, len(states))
    core.check_raw("lincomb", states, coef, *scale)
    if scale and scale[0].numel() != 1:
        raise ValueError(f"lincomb: scale must have one element, got {list(scale[0].shape)}")
    states, layout = core.one_layout(states)
    return states, torch.empty_like(states[0], memory_format=layout)


def _launch(states: list[Tensor], coef: Tensor, out: Tensor, scale: Tensor | None, scaled: Tensor | None) -> None:
    assert core.native is not None
    coef = coef.contiguous()
    args = (
        core.DTYPES[out.dtype],
        [s.data_ptr() for s in states],
        coef.data_ptr(),
        out.data_ptr(),
        core.DTYPES[scaled.dtype] if scaled is not None else 0,
        scale.data_ptr() if scale is not None else 0,
        scaled.data_ptr() if scaled is not None else 0,
        out.numel(),
    )
    if out.device.type == "cpu":
        core.native.lincomb_cpu(*args, torch.get_num_threads())
    else:
        core.launch(core.native.lincomb_cuda, args, out.device)


def _lincomb(states: list[Tensor], coef: Tensor) -> Tensor:
    states, out = _prepare(states, coef)
    _launch(states, coef, out, None, None)
    return out


def _lincomb_cast(states: list[Tensor], coef: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    states, out = _prepare(states, coef, scale)
    scaled = torch.empty_like(out, dtype=dtype)
    _launch(states, coef, out, scale, scaled)
    return out, scaled


def _lincomb_fake(states: list[Tensor], coef: Tensor) -> Tensor:
    return _prepare(states, coef)[1]


def _lincomb_cast_fake(states: list[Tensor], coef: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = _prepare(states, coef, scale)[1]
    return out, torch.empty_like(out, dtype=dtype)


def _gradients(
    g: Tensor, coef: Tensor, states: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[list[Tensor | None], Tensor | None]:
    """dL/dstates[i] = coef[i] g and dL/dcoef[i] = <g, states[i]>, through differentiable ops."""
    each = [torch.ops.gas_engine.lincomb([g], coef[i : i + 1]) if need else None for i, need in enumerate(needs)]
    return each, dots(g, states) if states else None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, coef = inputs
    kept = states if coef.requires_grad else ()
    ctx.save_for_backward(coef, *kept)


def _backward(ctx: Any, g: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
    coef, *states = ctx.saved_tensors
    return _gradients(g, coef, states, ctx.needs_input_grad[0])


def _setup_cast(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, coef, scale, _ = inputs
    kept = states if coef.requires_grad else ()
    ctx.has_scale_grad = scale.requires_grad
    ctx.save_for_backward(coef, scale, *((output[0],) if scale.requires_grad else ()), *kept)


def _backward_cast(
    ctx: Any, g_out: Tensor, g_scaled: Tensor
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None, None]:
    coef, scale, *states = ctx.saved_tensors
    g_scaled = g_scaled.to(g_out.dtype)
    d_scale = dots(states.pop(0), [g_scaled]).reshape(scale.shape) if ctx.has_scale_grad else None
    one = torch.ones(1, dtype=torch.float64, device=scale.device)
    g = torch.ops.gas_engine.lincomb([g_out, g_scaled], torch.cat([one, scale.reshape(1)]))
    return *_gradients(g, coef, states, ctx.needs_input_grad[0]), d_scale, None


for _name, _impl, _fake, _back, _ctx in (
    ("lincomb", _lincomb, _lincomb_fake, _backward, _setup),
    ("lincomb_cast", _lincomb_cast, _lincomb_cast_fake, _backward_cast, _setup_cast),
):
    core.LIBRARY.impl(_name, _impl, "CPU")
    core.LIBRARY.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"gas_engine::{_name}", _fake, lib=core.LIBRARY)
    torch.library.register_autograd(f"gas_engine::{_name}", _back, setup_context=_ctx, lib=core.LIBRARY)
