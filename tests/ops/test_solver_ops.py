"""The ops against their twins in float64: values, gradients, layouts, dtypes, determinism, refusals."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import DEVICES
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from gas_engine import ops
from gas_engine.ops import _native, _samples

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One rounding of the result to storage, plus the sum itself in the accumulation dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def wide(value: object) -> object:
    """The same inputs in float64: what the twins are judged by."""
    if isinstance(value, Tensor):
        return value.double()
    return [wide(v) for v in value] if isinstance(value, list | tuple) else value


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Error relative to the size of the whole tensor: single cancelled elements do not decide."""
    assert actual.shape == expected.shape
    if actual.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


def flat(inputs: tuple) -> list[Tensor]:
    return [t for v in inputs for t in (v if isinstance(v, list) else [v])]


def lincomb_flat(coef: Tensor, *states: Tensor) -> Tensor:
    return ops.lincomb(states, coef)


def lincomb_cast_flat(coef: Tensor, scale: Tensor, *states: Tensor) -> tuple[Tensor, Tensor]:
    return ops.lincomb(states, coef, scale, torch.float64)


def adjoint_flat(x: Tensor, f: Tensor, a: Tensor, b: Tensor, *g: Tensor) -> tuple[Tensor, ...]:
    return ops.adjoint_step(x, f, g, a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("J", "n"), [*((J, n) for J in (1, 4, 64) for n in _samples.ODD_SIZES), (4, 100_003)])
def test_values(J: int, n: int, dtype: torch.dtype, device: str) -> None:
    states, coef = _samples.lincomb_inputs((n,), J, dtype, device)
    out = ops.lincomb(states, coef)
    assert out.dtype == dtype
    assert_close(out, ops.lincomb_reference(*wide((states, coef))), dtype)

    inputs = _samples.adjoint_step_inputs((n,), J, dtype, device)
    actual, expected = ops.adjoint_step(*inputs), ops.adjoint_step_reference(*wide(inputs))
    for got, want in zip(actual[:2], expected[:2], strict=True):
        assert_close(got, want, dtype)
    size = inputs[0].double().norm() * inputs[2][0].double().norm() + 1e-30
    for got, want in zip(actual[2:], expected[2:], strict=True):
        assert got.dtype == torch.float64
        assert ((got - want).abs().max() / size) < (1e-14 if dtype == torch.float64 else 1e-6)
    torch.testing.assert_close(ops.dots(inputs[0], inputs[2]), actual[2], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cast", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_output(dtype: torch.dtype, cast: torch.dtype, device: str) -> None:
    """z is scale * y of the stored y, so that a recomputation from the stored state has the same bits."""
    states, coef = _samples.lincomb_inputs((3, 43), 5, dtype, device)
    scale = torch.tensor(0.37, dtype=torch.float64, device=device)
    y, z = ops.lincomb(states, coef, scale, cast)
    assert z.dtype == cast
    torch.testing.assert_close(y, ops.lincomb(states, coef), rtol=0, atol=0)
    again = ops.lincomb([y], torch.ones(1, device=device), scale, cast)[1]
    torch.testing.assert_close(z, again, rtol=0, atol=0)
    assert_close(z, 0.37 * y.double(), max(dtype, cast, key=TOLERANCE.__getitem__))
    only_cast = ops.lincomb(states, coef, cast=cast)[1]
    torch.testing.assert_close(only_cast, y.to(cast), rtol=0, atol=0)
    y_only_scale, z_only_scale = ops.lincomb(states, coef, scale)
    assert z_only_scale.dtype == y_only_scale.dtype == dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", FORMATS)
def test_layouts(layout: str, device: str) -> None:
    fmt = FORMATS[layout]
    inputs = _samples.adjoint_step_inputs((2, 3, 5, 7), 4, torch.float32, device, layout=fmt)
    expected = ops.adjoint_step_reference(*wide(inputs))
    actual = ops.adjoint_step(*inputs)
    assert all(t.is_contiguous(memory_format=fmt) for t in actual[:2])
    out, second = ops.lincomb(inputs[2], inputs[3], cast=torch.bfloat16)
    assert out.is_contiguous(memory_format=fmt) and second.is_contiguous(memory_format=fmt)
    for got, want in zip(actual[:2], expected[:2], strict=True):
        assert_close(got, want, torch.float32)

    # Layouts that disagree, slices, transposes and expanded tensors give the same numbers.
    x, f, g, a, b = inputs
    padded = torch.stack([x, x], dim=-1)[..., 0]
    mixed = [g[0].contiguous(memory_format=torch.channels_last), *g[1:]]
    for got, want in zip(ops.adjoint_step(padded, f, mixed, a, b), actual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    one = torch.ones(1, device=device).expand(2, 3, 5, 7)
    torch.testing.assert_close(ops.lincomb([one, one], a[:2]), (a[:2].sum() * one).float(), rtol=1e-6, atol=1e-6)
    strided = torch.stack([a, b], dim=1)
    torch.testing.assert_close(ops.lincomb(g, strided[:, 0]), ops.lincomb(g, a), rtol=0, atol=0)
    off_by_one = [torch.cat([t.flatten()[:1], t.flatten()])[1:] for t in g]  # not aligned to a vector
    torch.testing.assert_close(ops.lincomb(off_by_one, a), ops.lincomb([t.flatten() for t in g], a), rtol=0, atol=0)


def test_gradients() -> None:
    states, coef = _samples.lincomb_inputs((2, 3), 3, torch.float64, requires_grad=True)
    scale = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    x, f, g, a, b = _samples.adjoint_step_inputs((2, 3), 3, torch.float64, requires_grad=True)
    for function, inputs in (
        (lincomb_flat, (coef, *states)),
        (lincomb_cast_flat, (coef, scale, *states)),
        (adjoint_flat, (x, f, a, b, *g)),
        (lambda x, *g: ops.dots(x, g), (x, *g)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("needs", ["states", "coef"])
def test_gradients_are_paid_for_only_when_asked(needs: str) -> None:
    states, coef = _samples.lincomb_inputs((64,), 4)
    (coef if needs == "coef" else states[1]).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.lincomb(states, coef)
    assert (any(t.numel() == 64 for t in kept)) == (needs == "coef")
    out.sum().backward()
    if needs == "coef":
        torch.testing.assert_close(coef.grad, torch.stack([s.double().sum() for s in states]), rtol=1e-6, atol=1e-5)
    else:
        torch.testing.assert_close(states[1].grad, coef[1].float().expand(64))
        assert states[0].grad is None


def test_coef_keeps_its_dtype_and_the_twins_agree() -> None:
    states, coef = _samples.lincomb_inputs((64,), 4)
    coef32 = coef.float().requires_grad_()
    for function in (ops.lincomb, ops.lincomb_reference):
        (grad,) = torch.autograd.grad(function(states, coef32).square().sum(), coef32)
        assert grad.dtype == torch.float32
        torch.testing.assert_close(
            grad,
            2 * torch.stack([s @ ops.lincomb(states, coef32.detach()) for s in states]),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.skipif(_native.native is None, reason="the native core is off: the twins promise no fixed order")
def test_bits_do_not_depend_on_run_or_threads(device: str) -> None:
    inputs = _samples.adjoint_step_inputs((3, 70_001), 10, device=device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append((*ops.adjoint_step(*inputs), ops.lincomb(inputs[2], inputs[3])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def test_compile_fullgraph() -> None:
    def loss(x: Tensor, f: Tensor, g: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
        mu, g_x, da, db = ops.adjoint_step(x, f, g, a, b)
        y, z = ops.lincomb([mu, g_x], a[:2], b[0], torch.bfloat16)
        return y.square().sum() + z.float().sum() + (da * db).sum()

    inputs = _samples.adjoint_step_inputs((4, 33), 3, requires_grad=True)
    eager = torch.autograd.grad(loss(*inputs), flat(inputs))
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs), flat(inputs))
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want)


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        g = [torch.empty(2, 3, 5, 7).contiguous(memory_format=torch.channels_last) for _ in range(3)]
        mu, _, da, db = ops.adjoint_step(g[0], g[1], g, torch.empty(3), torch.empty(3))
    assert mu.stride() == g[0].stride() and mu.dtype == torch.float32
    assert da.shape == db.shape == (3,) and da.dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("output", DTYPES, ids=str)
@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_states_and_network_outputs_of_different_dtypes(state: torch.dtype, output: torch.dtype, device: str) -> None:
    x, f, g, a, b = _samples.adjoint_step_inputs((3, 43), 3, state, device)
    f = f.to(output)
    both = torch.promote_types(state, output)
    y = ops.lincomb([x, f, g[0]], a)
    assert y.dtype == both
    assert_close(y, ops.lincomb_reference(wide([x, f, g[0]]), a), both)
    mu, g_x, da, db = ops.adjoint_step(x, f, g, a, b)
    assert (mu.dtype, g_x.dtype, da.dtype, db.dtype) == (output, state, torch.float64, torch.float64)
    expected = ops.adjoint_step_reference(*wide((x, f, g, a, b)))
    assert_close(mu, expected[0], output if TOLERANCE[output] > TOLERANCE[state] else state)
    assert_close(g_x, expected[1], state)
    assert_close(da, expected[2], torch.float64 if both == torch.float64 else torch.float32)
    assert_close(db, expected[3], torch.float64 if both == torch.float64 else torch.float32)


def test_error_statistics_of_the_docstrings() -> None:
    """Relative L2 error and bias against the float64 twin, at J = 10 and CIFAR-10 states."""
    for dtype, error, bias in (
        (torch.float32, 1.2e-7, 1e-9),
        (torch.bfloat16, 1.8e-3, 2e-5),
        (torch.float16, 2.2e-4, 3e-6),
    ):
        x, f, g, a, b = _samples.adjoint_step_inputs((24, 3, 32, 32), 10, dtype)
        mu, g_x, da, db = ops.adjoint_step(x, f, g, a, b)
        expected = ops.adjoint_step_reference(*wide((x, f, g, a, b)))
        for got, want in zip((mu, g_x, ops.lincomb(g, a)), (*expected[:2], expected[1]), strict=True):
            difference = got.double() - want
            assert difference.norm() / want.norm() < error
            assert abs(difference.mean()) / want.square().mean().sqrt() < bias
        size = g[0].double().norm() * x.double().norm()
        assert (da - expected[2]).abs().max() / size < 1e-7
        assert (db - expected[3]).abs().max() / size < 1e-7


@pytest.mark.slow
@pytest.mark.skipif(
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 16 << 30,
    reason="needs 16 GiB of memory: two states of 4 GiB",
)
def test_states_beyond_two_to_the_31_elements() -> None:
    n = 2**31 + 4099
    state = torch.zeros(n, dtype=torch.bfloat16)
    state[-4100:] = 3.0  # around the point where 32-bit indices wrap
    y = ops.lincomb([state], torch.tensor([0.5]))
    assert y[: n - 4100].count_nonzero() == 0 and torch.all(y[-4100:] == 1.5)
    del y
    assert ops.dots(state, [state]).item() == 4100 * 9
    # The adjoint over its state, which spares the third tensor; state and network output are the same memory here.
    a, b = torch.tensor([-2.0]), torch.tensor([0.5])
    mu, da, db = ops.adjoint_step_(state, state, [state], a, b)
    for got, value in ((mu, 1.5), (state, -6.0)):
        assert got[: n - 4100].count_nonzero() == 0 and torch.all(got[-4100:] == value)
    assert da.item() == db.item() == 4100 * 9


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), max_size=5).map(tuple),
    J=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    order=st.randoms(use_true_random=False),
)
def test_any_shape_and_stride(shape: tuple[int, ...], J: int, dtype: torch.dtype, order: object) -> None:
    x, f, g, a, b = _samples.adjoint_step_inputs(shape, J, dtype)
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x, f, g = x.permute(axes), f.permute(axes), [t.permute(axes) for t in g]
    actual, expected = ops.adjoint_step(x, f, g, a, b), ops.adjoint_step_reference(*wide((x, f, g, a, b)))
    for got, want in zip(actual[:2], expected[:2], strict=True):
        assert_close(got, want, dtype)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-5, atol=1e-4)


X = torch.zeros(2, 3)
C1, C2 = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "seen"),
    [
        (lambda: ops.lincomb([], C1), ValueError, "got 0"),
        (lambda: ops.lincomb([X] * 65, torch.ones(65)), ValueError, "got 65"),
        (lambda: ops.lincomb(X, C2), TypeError, "got Tensor"),
        (lambda: ops.lincomb([X, 3.0], C2), TypeError, "float"),
        (lambda: ops.lincomb([X, X[:1]], C2), ValueError, r"\[1, 3\] beside \[2, 3\]"),
        (lambda: ops.lincomb([X.int()], C1), TypeError, "got torch.int32"),
        (lambda: ops.lincomb([X.to(torch.complex64)], C1), TypeError, "got torch.complex64"),
        (lambda: ops.lincomb([X, X.to("meta")], C2), ValueError, "on meta beside cpu"),
        (lambda: ops.lincomb([X, X], C1), ValueError, r"shape \[2\].*got \[1\]"),
        (lambda: ops.lincomb([X, X], C2.int()), TypeError, "got torch.int32"),
        (lambda: ops.lincomb([X, X], [1.0, 1.0]), TypeError, "got list"),
        (lambda: ops.lincomb([X], C1, scale=C2), ValueError, r"got torch.float32 \[2\]"),
        (lambda: ops.lincomb([X], C1, scale=2.0), ValueError, "got float"),
        (lambda: ops.lincomb([X], C1, cast=torch.int8), TypeError, "got torch.int8"),
        (lambda: ops.adjoint_step(X, X, [X, X], C2, C1), ValueError, r"b must have shape \[2\].*got \[1\]"),
        (lambda: ops.adjoint_step(X, X[:, :1], [X], C1, C1), ValueError, r"\[2, 1\] beside \[2, 3\]"),
        (lambda: ops.adjoint_step(None, X, [X], C1, C1), TypeError, "NoneType"),
        (lambda: ops.adjoint_step(X, X, [X[0]], C1, C1), ValueError, r"\[3\] beside \[2, 3\]"),
        (lambda: ops.adjoint_step(X, X, [], C1, C1), ValueError, "got 0"),
        (lambda: ops.dots(X, [X.int()]), TypeError, "got torch.int32"),
    ],
)
def test_refusals(call, error: type[Exception], seen: str) -> None:
    with pytest.raises(error, match=seen):
        call()


@pytest.mark.skipif(_native.native is None, reason="the native core is off: the twins are no registered ops")
def test_bare_ops_check_too() -> None:
    """Whoever calls torch.ops past the wrappers meets the same checks before a pointer is taken."""
    for call in (
        lambda: torch.ops.gas_engine.lincomb([X, X[:1]], C2.double()),
        lambda: torch.ops.gas_engine.lincomb([X, X], C1.double()),
        lambda: torch.ops.gas_engine.lincomb([X, X], C2),
        lambda: torch.ops.gas_engine.adjoint_step(X, X, [X], C1, C1.double()),
        lambda: torch.ops.gas_engine.lincomb_cast([X], C1.double(), C2.double(), torch.float32),
    ):
        with pytest.raises(ValueError, match="got"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run bench/gpu.sh on one")
def test_cuda_graph_and_host_coefficients() -> None:
    states, coef = _samples.lincomb_inputs((1134,), 4, device="cuda")
    x, f, g, a, b = _samples.adjoint_step_inputs((1134,), 4, device="cuda")
    ops.lincomb(states, coef), ops.adjoint_step(x, f, g, a, b)  # warm-up outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, results = ops.lincomb(states, coef), ops.adjoint_step(x, f, g, a, b)
    coef.mul_(2)
    graph.replay()
    torch.testing.assert_close(y, ops.lincomb(states, coef), rtol=0, atol=0)
    for got, want in zip(results, ops.adjoint_step(x, f, g, a, b), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(ops.lincomb(states, coef.cpu()), y, rtol=0, atol=0)
