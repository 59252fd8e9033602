"""A step and its way back: bit for bit with codes, for every dtype and every number, and by the float64 carry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gas_engine import ops
from gas_engine.ops import _samples
from gas_engine.ops.reference import ESCAPE

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run bench/gpu.sh on one"),
    ],
)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [_samples.draw(generator, shape, dtype, device) for _ in range(3)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a", [1.0, -0.7, 0.05, 1e-4, 0.0])
def test_inverse_is_bit_exact(a: float, dtype: torch.dtype, device: str) -> None:
    """Also where the numbers are infinite, not numbers, signed zeros or subnormal, and where coef[0] is zero."""
    x_prev, x, f = draw((3, 4567), dtype, device)
    odd = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max]
    x_prev[0, : len(odd)] = torch.tensor(odd, dtype=dtype)
    x[1, : len(odd)] = torch.tensor(odd, dtype=dtype)
    coef = torch.tensor([a, 1.0 - a, -0.2])
    x_next, codes = ops.reversible_step(x_prev, x, f, coef)
    assert codes is not None and codes.code.dtype == torch.int8
    assert codes.escaped.numel() == int((codes.code == ESCAPE).sum())
    torch.testing.assert_close(
        x_next[2].double(),
        ops.lincomb([x_prev, x, f], coef)[2].double(),
        rtol=8e-3 if dtype.itemsize < 4 else 1e-6,
        atol=1e-5,
    )
    assert same_bits(ops.reversible_inverse(x_next, x, f, coef, codes), x_prev)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_small_where_theory_says(dtype: torch.dtype) -> None:
    """Few bits, no escapes, at the coefficients a two-state solver has; a chain of steps comes all the way back."""
    x_prev, x, f = draw((2, 3, 16, 16), dtype)
    states, kept = [x_prev, x], []
    coefs = torch.tensor([[0.9, 0.05, 0.1], [0.8, 0.1, -0.1], [-1.1, 1.9, 0.05], [0.6, 0.3, 0.2]])
    for n, coef in enumerate(coefs):
        x_next, codes = ops.reversible_step(states[-2], states[-1], f * n, coef)
        states.append(x_next)
        kept.append(codes)
        distance = codes.code.double().abs()
        assert (1 + 2 * distance).log2().mean() < 4  # bits an element, about
        assert codes.nbytes < 1.05 * x.numel() + 64 * x.element_size()
    later, last = states[-1], states[-2]
    for n in reversed(range(len(coefs))):
        later, last = last, ops.reversible_inverse(later, last, f * n, coefs[n], kept[n])
        assert same_bits(last, states[n])


def test_carry_in_float64_gives_the_network_the_same_input() -> None:
    """States in float64, the network sees float32; no codes."""
    x_prev, x, _ = draw((2, 3, 16, 16), torch.float64)
    coefs = torch.tensor([[0.9, 0.05, 0.1], [0.8, 0.1, -0.1], [0.5, 0.4, 0.05]], dtype=torch.float64)

    def network(x: Tensor) -> Tensor:
        return torch.tanh(3 * x.float())

    states = [x_prev, x]
    for coef in coefs:
        x_next, codes = ops.reversible_step(states[-2], states[-1], network(states[-1]), coef, codes=False)
        assert codes is None and x_next.dtype == torch.float64
        states.append(x_next)
    later, last = states[-1], states[-2]
    for n in reversed(range(len(coefs))):
        later, last = last, ops.reversible_inverse(later, last, network(last), coefs[n])
        assert same_bits(last.float(), states[n].float())


def test_the_inverse_has_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    x_prev, x, f = (_samples.draw(generator, (3, 4), torch.float64, requires_grad=True) for _ in range(3))
    coef = torch.tensor([0.8, 0.3, -0.4], dtype=torch.float64, requires_grad=True)

    def there_and_back(x_prev: Tensor, x: Tensor, f: Tensor, coef: Tensor) -> Tensor:
        x_next, codes = ops.reversible_step(x_prev, x, f, coef)
        return ops.reversible_inverse(x_next, x, f, coef, codes)

    grads = torch.autograd.grad(there_and_back(x_prev, x, f, coef).square().sum(), (x_prev, x, f, coef))
    torch.testing.assert_close(grads[0], 2 * x_prev.detach())
    for grad in grads[1:]:
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


def test_escaped_elements_have_their_derivative_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x_prev, x, f = (_samples.draw(generator, (5000,), torch.float32) for _ in range(3))
    coef = torch.tensor([1e-3, 1.0, 1.0])
    x_next, codes = ops.reversible_step(x_prev, x, f, coef)
    assert codes.escaped.numel() > 1000
    x_next.requires_grad_()
    back = ops.reversible_inverse(x_next, x, f, coef, codes)
    assert same_bits(back.detach(), x_prev)
    (grad,) = torch.autograd.grad(back.sum(), x_next)
    torch.testing.assert_close(grad, torch.full_like(grad, 1000.0))


def test_opcheck_of_the_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    x_next, x, f = (_samples.draw(generator, (2, 3, 4, 5), requires_grad=True) for _ in range(3))
    coef = torch.tensor([0.8, 0.3, -0.4], dtype=torch.float64, requires_grad=True)
    code = torch.zeros(2, 3, 4, 5, dtype=torch.int8)
    torch.library.opcheck(torch.ops.gas_engine.reversible_inverse.default, (x_next, x, f, coef, code))


def test_layouts_agree_with_the_twin() -> None:
    x_prev, x, f = draw((2, 3, 5, 7), torch.float32)
    coef = torch.tensor([0.8, 0.15, -0.3])
    x_next, codes = ops.reversible_step(x_prev, x, f, coef)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x_prev, x, f)]
    other, other_codes = ops.reversible_step(*last, coef)
    assert other.is_contiguous(memory_format=torch.channels_last) and torch.equal(other, x_next)
    assert torch.equal(other_codes.code, codes.code)
    assert same_bits(ops.reversible_inverse(x_next, last[1], f, coef, other_codes), x_prev)
    twin_next, twin_code = ops.reversible_step_reference(x_prev, x, f, coef)
    torch.testing.assert_close(twin_next, x_next)
    assert torch.equal(ops.reversible_inverse_reference(twin_next, x, f, coef, twin_code), x_prev)


def test_threads_and_runs_agree_to_the_bit() -> None:
    """At a size that wakes the threads, with escapes."""
    x_prev, x, f = draw((3, 70_001), torch.float32)
    coef = torch.tensor([0.01, 1.0, -0.2])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            x_next, codes = ops.reversible_step(x_prev, x, f, coef)
            results.append((x_next, *codes, ops.reversible_inverse(x_next, x, f, coef, codes)))
    finally:
        torch.set_num_threads(threads)
    assert codes.escaped.numel() > 1000
    for other in results[1:]:
        assert all(same_bits(got, want) for got, want in zip(other, results[0], strict=True))


def test_compiled_with_a_number_of_escapes_that_depends_on_data() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda *v: ops.reversible_inverse(*_forth(*v)), backend="aot_eager", fullgraph=True)
        x_prev, x, f = draw((129,), torch.float32)
        assert same_bits(compiled(x_prev, x, f, torch.tensor([1e-3, 1.0, 1.0])), x_prev)


def _forth(x_prev: Tensor, x: Tensor, f: Tensor, coef: Tensor) -> tuple:
    x_next, codes = ops.reversible_step(x_prev, x, f, coef)
    return x_next, x, f, coef, codes


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    coef=st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_any_shape_and_coefficient(shape: tuple[int, ...], dtype: torch.dtype, coef: list[float], seed: int) -> None:
    x_prev, x, f = draw(shape, dtype, seed=seed)
    coef_ = torch.tensor(coef, dtype=torch.float64)
    x_next, codes = ops.reversible_step(x_prev, x, f, coef_)
    assert same_bits(ops.reversible_inverse(x_next, x, f, coef_, codes), x_prev)


X, C3 = torch.zeros(2, 3), torch.ones(3)
CODES = ops.ResidualCodes(torch.zeros(2, 3, dtype=torch.int8), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


@pytest.mark.parametrize(
    ("call", "error", "seen"),
    [
        (lambda: ops.reversible_step(X, X, X, C3[:2]), ValueError, r"shape \[3\].*got \[2\]"),
        (lambda: ops.reversible_step(X, X.double(), X, C3), TypeError, "float32 and torch.float64"),
        (lambda: ops.reversible_step(X, X, X[:1], C3), ValueError, r"\[1, 3\] beside \[2, 3\]"),
        (lambda: ops.reversible_step(X, X, X, C3, codes=False), ValueError, "needs float64 states, got torch.float32"),
        (lambda: ops.reversible_step(X, X.int(), X, C3), TypeError, "int32"),
        (lambda: ops.reversible_inverse(X, X, X, C3), ValueError, "need the codes"),
        (lambda: ops.reversible_inverse(X[:1], X[:1], X[:1], C3, CODES), ValueError, r"int8 \[1, 3\], got"),
    ],
)
def test_refusals(call, error: type[Exception], seen: str) -> None:
    with pytest.raises(error, match=seen):
        call()
