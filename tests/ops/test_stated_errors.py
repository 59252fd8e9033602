"""The errors that docstrings state, against the float64 twins: relative L2 within a factor of two, bias below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gas_engine import ops
from gas_engine.ops import _native
from gas_engine.ops._samples import draw

pytestmark = pytest.mark.skipif(_native.native is None, reason="the native core is off: the twins state no errors")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LAYOUTS = [torch.contiguous_format, torch.channels_last]
Function = Callable[..., Tensor]


def inputs(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [draw(generator, shape, dtype, requires_grad=True) for shape in shapes]


def pairs(op: Function, twin: Function, given: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The result and the gradients of all that is given: the op's, and the twin's in float64."""
    wide = [t.detach().double().requires_grad_() for t in given]
    y, want = op(*given), twin(*wide)
    g = draw(torch.Generator().manual_seed(1), tuple(y.shape), y.dtype)
    grads = zip(torch.autograd.grad(y, given, g), torch.autograd.grad(want, wide, g.double()), strict=True)
    return [(y.detach(), want.detach()), *grads]


def assert_stated(pair: tuple[Tensor, Tensor], error: float, bias: float) -> None:
    got, want = pair
    difference = got.double() - want
    seen = (difference.norm() / want.norm()).item()
    seen_bias = (difference.mean().abs() / want.square().mean().sqrt()).item()
    assert error / 2 < seen < 2 * error, f"relative error {seen:.1e}, stated {error:.1e}"
    assert seen_bias < bias, f"bias {seen_bias:.1e}, stated {bias:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "of_y", "of_dx", "of_others"),
    [
        (F32, (7.5e-8, 1e-8), (1.1e-7, 1e-8), ((1.5e-7, 4e-8), (3e-7, 4e-8))),
        (F64, (2e-16, 1e-17), (5e-16, 1e-17), ((5e-16, 1e-16), (9e-16, 1e-16))),
        (BF16, (1.7e-3, 5e-6), (1.7e-3, 5e-6), ((1.7e-3, 2e-4),) * 2),
        (F16, (2.1e-4, 2e-6), (2.1e-4, 2e-6), ((2.1e-4, 2e-5),) * 2),
    ],
    ids=["float32", "float64", "bfloat16", "float16"],
)
def test_group_norm_silu(dtype: torch.dtype, of_y: Any, of_dx: Any, of_others: Any, layout: Any) -> None:
    x, weight, bias, scale, shift = inputs(dtype, (4, 128, 32, 32), (128,), (128,), (4, 128), (4, 128))
    weight, bias = weight.detach(), bias.detach()
    x = x.detach().contiguous(memory_format=layout).requires_grad_()

    def modulated(function: Function) -> Function:
        def run(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return function(x, 32, weight.to(x.dtype), bias.to(x.dtype), scale=scale, shift=shift)

        return run

    y, dx, *others = pairs(*map(modulated, (ops.group_norm_silu, ops.group_norm_silu_reference)), [x, scale, shift])
    assert_stated(y, *of_y)
    assert_stated(dx, *of_dx)
    for pair in others:
        assert_stated(pair, *of_others[LAYOUTS.index(layout)])


@pytest.mark.parametrize(
    ("dtype", "error", "limit"), [(F32, 2.8e-8, 2e-9), (BF16, 1.8e-3, 6e-6), (F16, 2.3e-4, 2e-6)], ids=str
)
def test_bias_leaky_relu(dtype: torch.dtype, error: float, limit: float) -> None:
    x, bias = inputs(dtype, (8, 96, 32, 32), (96,))
    bias = bias.detach().float().requires_grad_()  # its gradient is seen before a narrower dtype rounds it
    y, _, dbias = pairs(ops.bias_leaky_relu, ops.bias_leaky_relu_reference, [x, bias])
    assert_stated(y, error, limit)
    assert_stated(dbias, 1e-7, 1e-8)


@pytest.mark.parametrize(
    ("dtype", "error", "limit"), [(F32, 6e-8, 5e-10), (BF16, 1.7e-3, 5e-6), (F16, 2.1e-4, 1e-6)], ids=str
)
@pytest.mark.parametrize(("up", "down"), [(1, 2), (2, 1)])
def test_resample2d(up: int, down: int, dtype: torch.dtype, error: float, limit: float) -> None:
    def with_taps(function: Function) -> Function:
        return lambda x: function(x, [1, 3, 3, 1], up, down)

    both = map(with_taps, (ops.resample2d, ops.resample2d_reference))
    for pair in pairs(*both, inputs(dtype, (8, 96, 32, 32))):
        assert_stated(pair, error, limit)


@pytest.mark.parametrize(
    ("dtype", "error", "limit"), [(F32, 4.9e-8, 5e-10), (BF16, 1.7e-3, 1e-5), (F16, 2.1e-4, 1e-6)], ids=str
)
def test_reversible_step(dtype: torch.dtype, error: float, limit: float) -> None:
    coef = torch.tensor([0.8, 0.15, -0.3], dtype=torch.float64)

    def step(function: Callable[..., Any]) -> Function:
        return lambda *states: function(*states, coef)[0]

    both = map(step, (ops.reversible_step, ops.reversible_step_reference))
    assert_stated(pairs(*both, inputs(dtype, *[(24, 3, 32, 32)] * 3))[0], error, limit)
