"""`reversible_step` and `reversible_inverse`: a two-state solver step that can be undone to the bit.

Shapes: states x[n-1], x[n], x[n+1] and the network's output F[n] of one shape [...]; coef [3].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from . import _native as core
from ._samples import Sample, draw
from .lincomb import gradients, lincomb
from .reference import ESCAPE, reversible_inverse_reference, reversible_step_reference

__all__ = ["ResidualCodes", "reversible_inverse", "reversible_step"]


class ResidualCodes(NamedTuple):
    """What the inverse of a rounded step misses: int8 counts of units in the last place, and a list of the elements
    where a count does not fit (code -128): `where`, flat indices [E] int64, and `escaped`, whole values [E].

    These are the elements near zero, whose units are far finer than the rounding of the next state: about 2 in
    10,000 of a normal state at coef[0] = 0.9.
    """

    code: Tensor
    where: Tensor
    escaped: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held: one an element, and eight and an element's own for each escape."""
        return self.code.nbytes + self.where.nbytes + self.escaped.nbytes


def reversible_step(
    x_prev: Tensor, x: Tensor, f: Tensor, coef: Tensor, codes: bool = True
) -> tuple[Tensor, ResidualCodes | None]:
    """One step of a two-state reversible solver, with what it takes to undo it exactly.

    x[n+1] = coef[0] x[n-1] + coef[1] x[n] + coef[2] F[n]   (a band tableau: A[n,n-1], A[n,n], B[n,n]; coef[0] != 0).
    The codes are the distance, in floats of the states' type, from x[n-1] to what `reversible_inverse` makes of the
    rounded x[n+1]: a few bits an element, more the smaller coef[0] is.

    `codes=False` is the carry: states in float64, whose rounding is far below that of the float32 network that
    evaluates them, so that the inverse comes back to the same network input without codes.

    Shapes and dtypes: x_prev, x, f [...] on one device, x_prev and x of one dtype (float32, float64, bfloat16,
    float16; float64 for the carry), f of any of these; coef [3] floating. Returns x_next like x, and the codes or None.
    Error of x_next against the float64 twin at coef (0.8, 0.15, -0.3), relative L2 (bias over norm): float32 4.9e-8
    (< 5e-10), bfloat16 1.7e-3 and float16 2.1e-4 (the rounding of the result; < 1e-5 and < 1e-6). The way back, none.
    Differentiable in all four, any number of times; the codes are constants.
    Memory: three reads and one write of a state, and n bytes of codes; the escapes are gathered in one more pass over
    the codes (on a GPU that waits for their number). The codes hold for the device and build that made them.
    Raises: ValueError (shapes, devices, a carry that is not float64) or TypeError (dtypes), with the value seen.

        x_next, codes = reversible_step(x_prev, x, f, coef)
        assert torch.equal(reversible_inverse(x_next, x, f, coef, codes), x_prev)
    """
    coef = _check("reversible_step", "x_prev", x_prev, x, f, coef)
    if not codes:
        if x.dtype != torch.float64:
            raise ValueError(f"reversible_step: the carry without codes needs float64 states, got {x.dtype}")
        return lincomb([x_prev, x, f], coef), None
    if torch._C._functorch.is_batchedtensor(x_prev) or torch._C._functorch.is_batchedtensor(x):
        raise NotImplementedError(
            "reversible_step: not under vmap, since the number of escapes of a sample is a dynamic shape; the op is "
            "elementwise, so give it the whole batch"
        )
    if core.runs_on(x):
        x_next, code = torch.ops.gas_engine.reversible_step(x_prev, x, f, coef)
    else:
        x_next, code = reversible_step_reference(x_prev, x, f, coef)
    index = (code == ESCAPE).flatten().nonzero().squeeze(1)
    return x_next, ResidualCodes(code, index, _at_least_1d(x_prev.detach())[_coordinates(index, x.shape)])


def reversible_inverse(
    x_next: Tensor, x: Tensor, f: Tensor, coef: Tensor, codes: ResidualCodes | None = None
) -> Tensor:
    """The state before a `reversible_step`: bit for bit with its codes, to rounding in float64 without.

    x[n-1] = (x[n+1] - coef[1] x[n] - coef[2] F[n]) / coef[0], rounded, plus the codes' units in the last place.

    Shapes, dtypes, memory, errors as in `reversible_step`; x, f and coef must be the very bits of the step.
    Differentiable in x_next, x, f and coef, any number of times.
    """
    coef = _check("reversible_inverse", "x_next", x_next, x, f, coef)
    if codes is None:
        if x.dtype != torch.float64:
            raise ValueError(f"reversible_inverse: {x.dtype} states need the codes of their step, got None")
        one = torch.ones(1, dtype=torch.float64, device=coef.device)
        return lincomb([x_next, x, f], torch.cat([one, -coef[1:]]) / coef[0])
    if codes.code.shape != x.shape or codes.code.dtype != torch.int8:
        seen = f"{codes.code.dtype} {list(codes.code.shape)}"
        raise ValueError(f"reversible_inverse: the codes must be int8 {list(x.shape)}, got {seen}")
    if core.runs_on(x):
        x_prev = torch.ops.gas_engine.reversible_inverse(x_next, x, f, coef, codes.code)
    else:
        x_prev = reversible_inverse_reference(x_next, x, f, coef, codes.code)
    exact = x_prev.detach().clone() if x_prev.requires_grad else x_prev  # the tape keeps the op's own result
    _at_least_1d(exact).index_put_(_coordinates(codes.where, x.shape), codes.escaped)
    return _Exactly.apply(x_prev, exact) if x_prev.requires_grad else exact


class _Exactly(torch.autograd.Function):
    """The second value with the first one's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g, None


def _at_least_1d(x: Tensor) -> Tensor:
    return x.view(x.shape or (1,))


def _coordinates(index: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Of flat indices into a tensor of any layout."""
    return torch.unravel_index(index, shape or (1,))


def _check(op: str, name: str, other: Tensor, x: Tensor, f: Tensor, coef: Tensor) -> Tensor:
    checks.check_list(op, f"({name}, x, f)", (other, x, f))
    checks.check_states(op, f"({name}, x, f)", (other, x, f))
    if other.dtype != x.dtype:
        raise TypeError(f"{op}: {name} and x must have one dtype, got {other.dtype} and {x.dtype}")
    checks.check_coef(op, "coef", coef, 3)
    return core.coefficients(coef, x.device)


def _prepare(other: Tensor, x: Tensor, f: Tensor, coef: Tensor, *code: Tensor) -> tuple[list[Tensor], Tensor]:
    """Dense tensors of one layout, and the empty state."""
    _check("reversible", "the other state", other, x, f, coef)
    checks.check_raw("reversible", [x], coef)
    dense, layout = core.one_layout([other, x, f, *code])
    return dense, torch.empty_like(x, memory_format=layout)


_kernel = core.kernel("reversible")


def _launch(previous: Tensor, x: Tensor, f: Tensor, coef: Tensor, x_next: Tensor, code: Tensor, inverse: bool) -> None:
    _kernel(x, x, previous, x, f, f, coef.contiguous(), x_next, code, x.numel(), inverse)


def _step(x_prev: Tensor, x: Tensor, f: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    (x_prev, x, f), x_next = _prepare(x_prev, x, f, coef)
    code = torch.empty_like(x_next, dtype=torch.int8)
    _launch(x_prev, x, f, coef, x_next, code, False)
    return x_next, code


def _step_fake(x_prev: Tensor, x: Tensor, f: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    x_next = _prepare(x_prev, x, f, coef)[1]
    return x_next, torch.empty_like(x_next, dtype=torch.int8)


def _inverse(x_next: Tensor, x: Tensor, f: Tensor, coef: Tensor, code: Tensor) -> Tensor:
    (x_next, x, f, code), x_prev = _prepare(x_next, x, f, coef, code)
    _launch(x_prev, x, f, coef, x_next, code, True)
    return x_prev


def _inverse_fake(x_next: Tensor, x: Tensor, f: Tensor, coef: Tensor, code: Tensor) -> Tensor:
    return _prepare(x_next, x, f, coef, code)[1]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *states, coef = inputs
    ctx.dtypes = [s.dtype if s.requires_grad else None for s in states]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(coef, *(states if coef.requires_grad else ()))


def _backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    coef, *states = ctx.saved_tensors
    each, d_coef = gradients(g, coef, states, ctx.dtypes)
    return *each, d_coef


def _setup_inverse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_next, x, f, coef, _ = inputs
    ctx.dtypes = [s.dtype if s.requires_grad else None for s in (x_next, x, f)]
    ctx.save_for_backward(coef, *((output, x, f) if coef.requires_grad else ()))


def _backward_inverse(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Of x_prev = (x_next - coef[1] x - coef[2] f) / coef[0]: dx_prev/dcoef = -(x_prev, x, f) / coef[0]."""
    coef, *states = ctx.saved_tensors
    one = torch.ones(1, dtype=torch.float64, device=coef.device)
    each, d_coef = gradients(g, torch.cat([one, -coef[1:]]) / coef[0], states, ctx.dtypes)
    return *each, None if d_coef is None else -d_coef / coef[0], None


core.register(
    "reversible_step(Tensor x_prev, Tensor x, Tensor f, Tensor coef) -> (Tensor, Tensor)",
    _step,
    _step_fake,
    _backward,
    _setup,
)
core.register(
    "reversible_inverse(Tensor x_next, Tensor x, Tensor f, Tensor coef, Tensor code) -> Tensor",
    _inverse,
    _inverse_fake,
    _backward_inverse,
    _setup_inverse,
)


def reversible_step_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """Odd sizes, channels_last, a narrower network output, a coefficient small enough for escapes."""
    generator = torch.Generator().manual_seed(0)
    coef = torch.tensor([0.8, 0.15, -0.3], dtype=torch.float64, device=device, requires_grad=requires_grad)
    for shape in ((0,), (1,), (3,), (129,), (2, 567), (2, 3, 4, 5)):
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        states = [draw(generator, shape, dtype, device, requires_grad, layout) for _ in range(3)]
        yield Sample((*states, coef))
    narrow = draw(generator, (2, 3, 4, 5), torch.bfloat16, device, requires_grad)
    yield Sample((*states[:2], narrow, coef))
    small = torch.tensor([1e-3, 1.0, 1.0], dtype=torch.float64, device=device)
    yield Sample((*states, small))
