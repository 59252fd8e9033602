"""Gated units against PyTorch's own operations; the bytes they keep; what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kept import kept_bytes
from torch import Tensor

from gas_engine import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def stock_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_pytorch(dtype: torch.dtype) -> None:
    """Also far out in the tails, at zero and at infinity."""
    x = torch.randn(7, 2 * 130, dtype=torch.float64) * 6
    x[:, 130:135] = torch.tensor([0.0, -0.0, 30.0, -30.0, 100.0])
    x = x.to(dtype)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for function, stock in (
        (ops.geglu, stock_geglu),
        (lambda x: ops.geglu(x, "tanh"), lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1], approximate="tanh")),
        (ops.silu_mul, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
        (lambda x: ops.silu_mul(x[:, :130], x[:, 130:]), lambda x: F.silu(x[:, :130]) * x[:, 130:]),
    ):
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        y, want = function(a), stock(b)
        torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
        g = torch.randn_like(want)
        (got,), (slope,) = torch.autograd.grad(y, a, g.to(dtype)), torch.autograd.grad(want, b, g.to(dtype).double())
        torch.testing.assert_close(got.double(), slope, rtol=tolerance, atol=3 * tolerance)


def test_keeps_the_input_once() -> None:
    x = torch.randn(5, 64, requires_grad=True)
    h = x * 1
    assert kept_bytes(lambda: ops.geglu(h)) == h.nbytes
    assert kept_bytes(lambda: stock_geglu(h)) == h.nbytes + h.nbytes // 2
    gate, value = h.chunk(2, -1)
    assert kept_bytes(lambda: ops.silu_mul(gate, value)) == h.nbytes
    assert kept_bytes(lambda: ops.silu_mul(h)) == h.nbytes
    assert kept_bytes(lambda: F.silu(gate) * value) == h.nbytes + h.nbytes // 2


def test_error_statistics_of_the_docstrings() -> None:
    x = torch.randn(64, 2560, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype, error, bias in (
        (torch.float32, 1e-7, 2e-9),
        (torch.bfloat16, 1.8e-3, 1e-5),
        (torch.float16, 2.2e-4, 2e-6),
    ):
        narrow = x.to(dtype)
        for op, twin in ((ops.geglu, ops.geglu_reference), (ops.silu_mul, ops.silu_mul_reference)):
            want = twin(narrow.double())
            difference = op(narrow).double() - want
            assert difference.norm() / want.norm() < error
            assert abs(difference.mean()) / want.square().mean().sqrt() < bias


def test_threads_and_runs_agree_to_the_bit() -> None:
    """At sizes that wake the threads, forward and backward."""
    x = torch.randn(3, 70_002, requires_grad=True)
    g = torch.randn(3, 35_001)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            gate, value = x.chunk(2, -1)
            each = (ops.geglu(x), ops.geglu(x, "tanh"), ops.silu_mul(x), ops.silu_mul(gate, value))
            results.append([t for y in each for t in (y, *torch.autograd.grad(y, x, g))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


@pytest.mark.parametrize(
    ("call", "error", "seen"),
    [
        (lambda: ops.geglu(torch.zeros(2, 3)), ValueError, r"must be even, got \[2, 3\]"),
        (lambda: ops.geglu(torch.zeros(())), ValueError, r"got \[\]"),
        (lambda: ops.geglu(torch.zeros(2, 4), "erf"), ValueError, "got 'erf'"),
        (lambda: ops.geglu(torch.zeros(2, 4, dtype=torch.int32)), TypeError, "int32"),
        (lambda: ops.silu_mul(torch.zeros(2), torch.zeros(3)), ValueError, r"\[3\] beside \[2\]"),
        (lambda: ops.silu_mul(torch.zeros(2), torch.zeros(2).double()), TypeError, "float32 and torch.float64"),
        (lambda: ops.silu_mul(None), TypeError, "NoneType"),
    ],
)
def test_refusals(call, error: type[Exception], seen: str) -> None:
    with pytest.raises(error, match=seen):
        call()


def test_second_derivatives_are_refused_in_words() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(ops.geglu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no derivative of its own.*twin"):
        slope.sum().backward()
