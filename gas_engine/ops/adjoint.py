"""`adjoint_step`: everything the backward pass of one solver step asks of its memory, in one pass.

Shapes: x, f and J cotangents g of one shape [...]; a, b [J].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _native as core
from .reference import adjoint_step_reference, dots_reference

__all__ = ["adjoint_step", "adjoint_step_", "dots"]


def adjoint_step(
    x: Tensor, f: Tensor, g: Sequence[Tensor], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of one tableau column: two sums of the later cotangents, and their products with x and f.

    mu = sum_i b[i] g[i];  g_x = sum_i a[i] g[i];  da[i] = <g[i], x>;  db[i] = <g[i], f>
    (discrete adjoint of x[n+1] = sum_j A[n,j] x[j] + B[n,j] F[j], with a = A[n,j], b = B[n,j], n = j..K-1).

    Shapes and dtypes: x, f and the J tensors of g [...] on one device, 1 <= J <= 64, each float32, float64,
    bfloat16 or float16 (a network's output f may be narrower than the state x); a, b [J] floating, on any device
    (host tensors beside CUDA states are copied without a wait). Returns mu like f, g_x like x, and da, db
    float64 [J]. Sums over J run in float32, or float64 where x or f is float64. The products are summed in
    short float32 runs, and those in float64, in a fixed order: the same bits for every run and every number of
    threads.
    Error against the float64 twin at J = 10, relative L2 (bias over norm): mu and g_x as in `lincomb`; da and
    db 6e-8 (< 1e-8) of |g| |x| in every dtype.
    Differentiable in all inputs, any number of times: its own backward pass is one more `adjoint_step`.
    Memory: reads x, f and each g once, writes mu and g_x once: J+4 state-sized moves, no such temporary.
    Raises: ValueError (shapes, devices, lengths) or TypeError (dtypes), with the value seen.

        x, f, g1, g2 = torch.randn(4, 8, 3, 32, 32)
        a, b = torch.tensor([0.9, 0.0]), torch.tensor([-0.1, 0.2])
        mu, g_x, da, db = adjoint_step(x, f, [g1, g2], a, b)
    """
    small = core.uniform(g, (x, f), (a, b))
    if not small:
        checks.check_list("adjoint_step", "(x, f)", (x, f))
        checks.check_list("adjoint_step", "g", g)
    checks.check_coef("adjoint_step", "a", a, len(g))
    checks.check_coef("adjoint_step", "b", b, len(g))
    a, b = core.coefficients(a, x.device), core.coefficients(b, x.device)
    if small:
        mu, g_x, da, db = map(torch.empty_like, (f, x, a, b))
        _launch(x, f, g, (da, db), (a, b), (mu, g_x))
        return mu, g_x, da, db
    if not core.runs_on(x) or core.batched(x, f, a, b, *g):
        _check("adjoint_step", x, f, g, a, b)
        return adjoint_step_reference(x, f, list(g), a, b)
    return torch.ops.gas_engine.adjoint_step(x, f, list(g), a, b)


@torch.no_grad()
def adjoint_step_(x: Tensor, f: Tensor, g: Sequence[Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`adjoint_step` that writes g_x over x and returns mu, da, db: a sampler's K+1 slots are all it needs.

    x must be dense (contiguous, or channels_last with all the others). Not differentiable. For the equation,
    dtypes and errors see `adjoint_step`. Memory: J+4 moves; the one new tensor is mu.

        mu, da, db = adjoint_step_(x, f, [g1, g2], a, b)    # x now holds its own cotangent
    """
    checks.check_list("adjoint_step_", "(x, f)", (x, f))
    checks.check_list("adjoint_step_", "g", g)
    _check("adjoint_step_", x, f, g, a, b)
    a, b = core.coefficients(a, x.device), core.coefficients(b, x.device)
    if not core.runs_on(x):
        mu, g_x, da, db = adjoint_step_reference(x, f, list(g), a, b)
        x.copy_(g_x)
        return mu, da, db
    if core.direct(x, f, *g, a, b):
        torch.autograd.graph.increment_version(x)
        return _adjoint_step_inplace(x, f, list(g), a, b)
    return torch.ops.gas_engine.adjoint_step_(x, f, list(g), a, b)


def dots(x: Tensor, states: Sequence[Tensor]) -> Tensor:
    """Inner products of one tensor with J others: d[i] = <states[i], x>, float64 [J], in a fixed order.

    Shapes, dtypes, errors as in `adjoint_step`. Memory: reads x and each state once, J+1 moves.
    Differentiable in all inputs, any number of times.
    """
    checks.check_list("dots", "(x,)", (x,))
    checks.check_list("dots", "states", states)
    if not core.runs_on(x) or core.batched(x, *states):
        checks.check_states("dots", "states", states, like=x)
        return dots_reference(x, list(states))
    return torch.ops.gas_engine.dots(x, list(states))


def _check(op: str, x: Tensor, f: Tensor, g: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    checks.check_states(op, "g", g, like=x)
    checks.check_states(op, "(x, f)", (x, f))
    checks.check_coef(op, "a", a, len(g))
    checks.check_coef(op, "b", b, len(g))


def _launch(
    x: Tensor,
    f: Tensor | None,
    g: Sequence[Tensor],
    sums: Sequence[Tensor],
    coefs: Sequence[Tensor | None] = (None, None),
    outs: Sequence[Tensor | None] = (None, None),
) -> None:
    """Run the kernel on dense tensors: it fills the sums with x (and with f, if given), and the outs."""
    n = x.numel()
    if n == 0:  # empty tensors have null pointers: nothing is launched for them
        for s in sums:
            s.zero_()
        return
    workspace = None  # the host path has its own
    if x.is_cuda:
        assert core.native is not None
        words = len(g) * len(sums) * core.native.REDUCTION_BLOCKS
        workspace = torch.empty(words, dtype=torch.float64, device=x.device)
    a, b = [c if c is None else c.contiguous() for c in coefs]
    _kernel(x, x, x, f, f, g, a, b, *outs, sums[0], sums[-1], workspace, n)


def _prepare(
    x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor
) -> tuple[list[Tensor], torch.memory_format, Tensor]:
    """Checked tensors in one layout, and the empty mu."""
    _check("adjoint_step", x, f, g, a, b)
    checks.check_raw("adjoint_step", [x], a, b)
    dense, layout = core.one_layout([x, f, *g])
    return dense, layout, torch.empty_like(f, memory_format=layout)


def _adjoint_step(x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (x, f, *g), layout, mu = _prepare(x, f, g, a, b)
    g_x = torch.empty_like(x, memory_format=layout)
    da, db = torch.empty_like(a), torch.empty_like(b)
    _launch(x, f, g, (da, db), (a, b), (mu, g_x))
    return mu, g_x, da, db


def _adjoint_step_fake(
    x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, layout, mu = _prepare(x, f, g, a, b)
    return mu, torch.empty_like(x, memory_format=layout), a.new_empty(a.shape), b.new_empty(b.shape)


def _prepare_inplace(x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor) -> tuple[list[Tensor], Tensor]:
    dense, _, mu = _prepare(x, f, g, a, b)
    if dense[0] is not x:
        raise ValueError(f"adjoint_step_: x is overwritten, so it must be dense like f and g, got strides {x.stride()}")
    return dense, mu


def _adjoint_step_inplace(x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (_, f, *g), mu = _prepare_inplace(x, f, g, a, b)
    start, end = x.data_ptr(), x.data_ptr() + x.nbytes
    for t in (f, *g):
        if t.data_ptr() != start and t.data_ptr() < end and start < t.data_ptr() + t.nbytes:
            raise ValueError("adjoint_step_: x is overwritten, and f or one of g overlaps its memory; clone it")
    da, db = torch.empty_like(a), torch.empty_like(b)
    _launch(x, f, g, (da, db), (a, b), (mu, x))
    return mu, da, db


def _adjoint_step_inplace_fake(
    x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _prepare_inplace(x, f, g, a, b)[1], a.new_empty(a.shape), b.new_empty(b.shape)


def _bump(keys: Any, x: Tensor, *rest: Any) -> Any:
    """For the dispatcher, which does not do it by itself: autograd learns that x changed, before the kernel runs."""
    torch.autograd.graph.increment_version(x)
    return torch.ops.gas_engine.adjoint_step_.default.redispatch(
        keys & torch._C._after_ADInplaceOrView_keyset, x, *rest
    )


def _dots(x: Tensor, states: list[Tensor]) -> Tensor:
    checks.check_states("dots", "states", states, like=x)
    (x, *states), _ = core.one_layout([x, *states])
    sums = x.new_empty(len(states), dtype=torch.float64)
    _launch(x, None, states, (sums,))
    return sums


def _dots_fake(x: Tensor, states: list[Tensor]) -> Tensor:
    checks.check_states("dots", "states", states, like=x)
    return x.new_empty(len(states), dtype=torch.float64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, f, g, a, b = inputs
    ctx.dtypes = [t.dtype if t.requires_grad else None for t in g]
    ctx.save_for_backward(x, f, a, b, *g)


def _backward(
    ctx: Any, g_mu: Tensor, g_gx: Tensor, g_da: Tensor, g_db: Tensor
) -> tuple[Tensor, Tensor, list[Tensor | None], Tensor, Tensor]:
    """With cotangents in the place of x, f, a, b the same four sums give the gradients of f, x, a, b."""
    x, f, a, b, *g = ctx.saved_tensors
    d_f, d_x, d_a, d_b = adjoint_step(g_gx, g_mu, g, g_da, g_db)
    coef = torch.stack([b, a, g_da, g_db], dim=1)
    d_g = [
        None if dtype is None else _lincomb()([g_mu, g_gx, x, f], coef[i]).to(dtype)
        for i, dtype in enumerate(ctx.dtypes)
    ]
    return d_x, d_f, d_g, d_a, d_b


def _setup_dots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, states = inputs
    ctx.dtypes = [s.dtype if s.requires_grad else None for s in states]
    ctx.x_dtype = x.dtype if x.requires_grad else None
    ctx.save_for_backward(*((x,) if any(ctx.dtypes) else ()), *(states if x.requires_grad else ()))


def _backward_dots(ctx: Any, g: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    saved = list(ctx.saved_tensors)
    x = saved.pop(0) if any(ctx.dtypes) else None
    d_x = _lincomb()(saved, g).to(ctx.x_dtype) if ctx.x_dtype else None
    return d_x, [
        None if dtype is None else _lincomb()([x], g[i : i + 1]).to(dtype) for i, dtype in enumerate(ctx.dtypes)
    ]


_kernel = core.kernel("adjoint")


def _lincomb() -> Any:
    from .lincomb import lincomb  # which imports this module

    return lincomb


core.register(
    "adjoint_step(Tensor x, Tensor f, Tensor[] g, Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, Tensor)",
    _adjoint_step,
    _adjoint_step_fake,
    _backward,
    _setup,
)
core.register(
    "adjoint_step_(Tensor(a!) x, Tensor f, Tensor[] g, Tensor a, Tensor b) -> (Tensor, Tensor, Tensor)",
    _adjoint_step_inplace,
    _adjoint_step_inplace_fake,
)
core.LIBRARY.impl("adjoint_step_", _bump, "ADInplaceOrView", with_keyset=True)
core.register("dots(Tensor x, Tensor[] states) -> Tensor", _dots, _dots_fake, _backward_dots, _setup_dots)
