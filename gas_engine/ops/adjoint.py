"""`adjoint_step`: everything the backward pass of one solver step asks of its memory, in one pass.

Shapes: x, f and J cotangents g of one shape [...]; a, b [J].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native as core
from .reference import adjoint_step_reference, dots_reference

__all__ = ["adjoint_step", "dots"]


def adjoint_step(
    x: Tensor, f: Tensor, g: Sequence[Tensor], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of one tableau column: two sums of the later cotangents, and their products with x and f.

    mu = sum_i b[i] g[i];  g_x = sum_i a[i] g[i];  da[i] = <g[i], x>;  db[i] = <g[i], f>
    (discrete adjoint of x[n+1] = sum_j A[n,j] x[j] + B[n,j] F[j], with a = A[n,j], b = B[n,j], n = j..K-1).

    Shapes and dtypes: x, f and the J tensors of g [...], one dtype (float32, float64, bfloat16, float16) and
    device, 1 <= J <= 64; a, b [J] floating, on any device (host tensors beside CUDA states are copied without
    a wait). Returns mu, g_x like x, and da, db float64 [J]. Sums over J run in float32 (float64 for float64).
    The products are summed in short float32 runs, and those in float64, in a fixed order: the same bits for
    every run and every number of threads.
    Differentiable in all inputs, any number of times: its own backward pass is one more `adjoint_step`.
    Memory: reads x, f and each g once, writes mu and g_x once: J+4 state-sized moves, no such temporary.
    Raises: ValueError (shapes, devices, lengths) or TypeError (dtypes), with the value seen.

        x, f, g1, g2 = torch.randn(4, 8, 3, 32, 32)
        a, b = torch.tensor([0.9, 0.0]), torch.tensor([-0.1, 0.2])
        mu, g_x, da, db = adjoint_step(x, f, [g1, g2], a, b)
    """
    if core.direct(x, f, *g, a, b):
        return _adjoint_step(x, f, list(g), core.coefficients(a, x.device), core.coefficients(b, x.device))
    core.check_list("adjoint_step", "(x, f)", (x, f))
    core.check_list("adjoint_step", "g", g)
    core.check_coef("adjoint_step", "a", a, len(g))
    core.check_coef("adjoint_step", "b", b, len(g))
    if not core.runs_on(x.device):
        _check(x, f, g, a, b)
        return adjoint_step_reference(x, f, list(g), a, b)
    a, b = core.coefficients(a, x.device), core.coefficients(b, x.device)
    return torch.ops.gas_engine.adjoint_step(x, f, list(g), a, b)


def dots(x: Tensor, states: Sequence[Tensor]) -> Tensor:
    """Inner products of one tensor with J others: d[i] = <states[i], x>, float64 [J], in a fixed order.

    Shapes, dtypes, errors as in `adjoint_step`. Memory: reads x and each state once, J+1 moves.
    Differentiable in all inputs, any number of times.
    """
    core.check_list("dots", "(x,)", (x,))
    core.check_list("dots", "states", states)
    if not core.runs_on(x.device):
        core.check_states("dots", "states", states, like=x)
        return dots_reference(x, list(states))
    return torch.ops.gas_engine.dots(x, list(states))


core.LIBRARY.define(
    "adjoint_step(Tensor x, Tensor f, Tensor[] g, Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, Tensor)"
)
core.LIBRARY.define("dots(Tensor x, Tensor[] states) -> Tensor")


def _check(x: Tensor, f: Tensor, g: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    core.check_states("adjoint_step", "g", g, like=x)
    core.check_states("adjoint_step", "(x, f)", (x, f))
    core.check_coef("adjoint_step", "a", a, len(g))
    core.check_coef("adjoint_step", "b", b, len(g))


def _launch(
    x: Tensor,
    f: Tensor | None,
    g: list[Tensor],
    coefs: tuple[Tensor, Tensor] | None,
    outs: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    """Run the kernel on dense tensors; returns the products, float64 [J], with x (and with f, if given)."""
    assert core.native is not None
    make = torch.empty if x.numel() else torch.zeros  # empty tensors have null pointers: nothing is launched for them
    sums = [make(len(g), dtype=torch.float64, device=x.device) for t in (x, f) if t is not None]
    if not x.numel():
        return sums
    words = core.native.adjoint_workspace(x.numel(), len(g) * len(sums), x.device.type == "cuda")
    workspace = torch.empty(words, dtype=torch.float64, device=x.device)
    args = (
        core.DTYPES[x.dtype],
        x.data_ptr(),
        f.data_ptr() if f is not None else 0,
        [t.data_ptr() for t in g],
        *([c.data_ptr() for c in coefs] if coefs is not None else (0, 0)),
        *([out.data_ptr() for out in outs] if outs is not None else (0, 0)),
        sums[0].data_ptr(),
        sums[-1].data_ptr(),
        workspace.data_ptr(),
        x.numel(),
    )
    if x.device.type == "cpu":
        core.native.adjoint_cpu(*args, torch.get_num_threads())
    else:
        core.launch(core.native.adjoint_cuda, args, x.device)
    return sums


def _prepare(x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Checked tensors in one layout, and the empty mu and g_x."""
    _check(x, f, g, a, b)
    core.check_raw("adjoint_step", [x], a, b)
    dense, layout = core.one_layout([x, f, *g])
    return dense, (torch.empty_like(x, memory_format=layout), torch.empty_like(x, memory_format=layout))


def _adjoint_step(x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (x, f, *g), outs = _prepare(x, f, g, a, b)
    da, db = _launch(x, f, g, (a.contiguous(), b.contiguous()), outs)
    return *outs, da, db


def _adjoint_step_fake(
    x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_prepare(x, f, g, a, b)[1], a.new_empty(a.shape), b.new_empty(b.shape)


def _dots(x: Tensor, states: list[Tensor]) -> Tensor:
    core.check_states("dots", "states", states, like=x)
    (x, *states), _ = core.one_layout([x, *states])
    return _launch(x, None, states, None, None)[0]


def _dots_fake(x: Tensor, states: list[Tensor]) -> Tensor:
    core.check_states("dots", "states", states, like=x)
    return x.new_empty(len(states), dtype=torch.float64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, f, g, a, b = inputs
    ctx.save_for_backward(x, f, a, b, *g)


def _backward(
    ctx: Any, g_mu: Tensor, g_gx: Tensor, g_da: Tensor, g_db: Tensor
) -> tuple[Tensor, Tensor, list[Tensor | None], Tensor, Tensor]:
    """With cotangents in the place of x, f, a, b the same four sums give the gradients of f, x, a, b."""
    x, f, a, b, *g = ctx.saved_tensors
    d_f, d_x, d_a, d_b = torch.ops.gas_engine.adjoint_step(g_gx, g_mu, g, g_da, g_db)
    coef = torch.stack([b, a, g_da, g_db], dim=1)
    d_g = [
        torch.ops.gas_engine.lincomb([g_mu, g_gx, x, f], coef[i]) if need else None
        for i, need in enumerate(ctx.needs_input_grad[2])
    ]
    return d_x, d_f, d_g, d_a, d_b


def _setup_dots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, states = inputs
    ctx.kept_x = any(s.requires_grad for s in states)
    ctx.save_for_backward(*((x,) if ctx.kept_x else ()), *(states if x.requires_grad else ()))


def _backward_dots(ctx: Any, g: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    saved, needs = list(ctx.saved_tensors), ctx.needs_input_grad[1]
    x = saved.pop(0) if ctx.kept_x else None
    d_x = torch.ops.gas_engine.lincomb(saved, g) if saved else None
    return d_x, [torch.ops.gas_engine.lincomb([x], g[i : i + 1]) if need else None for i, need in enumerate(needs)]


for _name, _impl, _fake, _back, _ctx in (
    ("adjoint_step", _adjoint_step, _adjoint_step_fake, _backward, _setup),
    ("dots", _dots, _dots_fake, _backward_dots, _setup_dots),
):
    core.LIBRARY.impl(_name, _impl, "CPU")
    core.LIBRARY.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"gas_engine::{_name}", _fake, lib=core.LIBRARY)
    torch.library.register_autograd(f"gas_engine::{_name}", _back, setup_context=_ctx, lib=core.LIBRARY)
