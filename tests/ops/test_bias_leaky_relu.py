"""`bias_leaky_relu` against its twin in float64 and PyTorch's own ops: values, gradients of any order, bytes kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import DEVICES, needs_core
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from gas_engine import ops
from gas_engine.ops._samples import Sample, draw
from gas_engine.ops.bias_leaky_relu import bias_leaky_relu_samples

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    if actual.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"relative error {error:.1e}"


def wide(sample: Sample) -> Sample:
    return sample._replace(args=tuple(t.detach().double().requires_grad_(t.requires_grad) for t in sample.args))


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = draw(generator, shape, dtype, device, True, layout)
    return x, draw(generator, shape[1:2], dtype, device, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, device: str) -> None:
    for sample in bias_leaky_relu_samples(dtype, device, requires_grad=True):
        twin = wide(sample)
        y, expected = (
            f(*s.args, **s.kwargs) for f, s in ((ops.bias_leaky_relu, sample), (ops.bias_leaky_relu_reference, twin))
        )
        assert y.dtype == dtype and y.stride() == sample.args[0].stride()
        assert_close(y, expected, TOLERANCE[dtype])
        with torch.no_grad():
            torch.testing.assert_close(ops.bias_leaky_relu(*sample.args, **sample.kwargs), y, rtol=0, atol=0)
        g = draw(torch.Generator().manual_seed(2), tuple(y.shape), dtype, device)
        grads = torch.autograd.grad(y, sample.args, g)
        twins = torch.autograd.grad(expected, twin.args, g.double())
        assert_close(grads[0], twins[0], TOLERANCE[dtype])
        if len(grads) > 1 and y.numel():
            # A channel's sum may cancel: its error is judged by what it sums.
            size = twins[0].transpose(0, 1).flatten(1).norm(dim=1).max() + twins[1].abs().max()
            assert (grads[1].double() - twins[1]).abs().max() <= TOLERANCE[dtype] * size


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_torch(dtype: torch.dtype, device: str) -> None:
    x, bias = inputs((2, 24, 9, 11), dtype, device)
    y, stock = ops.bias_leaky_relu(x, bias), F.leaky_relu(x + bias[:, None, None], 0.2)
    torch.testing.assert_close(y, stock, rtol=0, atol=0)
    grads = [torch.autograd.grad(v.square().sum(), (x, bias)) for v in (y, stock)]
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=0)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_and_nan(device: str) -> None:
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 2.0], device=device, requires_grad=True)
    for slope in (0.2, 0.0, -2.0):
        y, stock = ops.bias_leaky_relu(x, slope=slope), F.leaky_relu(x, slope)
        torch.testing.assert_close(y, stock, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(y[:2]), torch.signbit(stock[:2]))
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, torch.where(x > 0, 1.0, slope), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias: bool, layout: torch.memory_format) -> None:
    x, bias = inputs((2, 3, 3, 5), torch.float64, layout=layout)
    arguments = (x, bias) if with_bias else (x,)
    assert gradcheck(ops.bias_leaky_relu, arguments)
    assert gradgradcheck(ops.bias_leaky_relu, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(2, 8, 5, 13), (3, 100), (2, 16, 8, 8)])
def test_any_order(shape: tuple[int, ...], device: str) -> None:
    """A penalty on the gradient, and a penalty on its gradient, as ordinary autograd gives them."""
    x, bias = inputs(shape, torch.float64, device)
    results = []
    for f in (ops.bias_leaky_relu, ops.bias_leaky_relu_reference):
        y = f(x, bias).pow(3).sum()
        first = torch.autograd.grad(y, (x, bias), create_graph=True)
        second = torch.autograd.grad(sum(t.pow(2).sum() for t in first), (x, bias), create_graph=True)
        third = torch.autograd.grad(sum(t.pow(2).sum() for t in second), (x, bias))
        results.append((*first, *second, *third))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_core
def test_one_bit_per_element_is_kept(dtype: torch.dtype, device: str) -> None:
    x, bias = inputs((2, 24, 9, 11), dtype, device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.bias_leaky_relu(x, bias)
        g = torch.ones_like(y).requires_grad_()
        dx, dbias = torch.autograd.grad(y, (x, bias), g, create_graph=True)
        torch.autograd.grad(dx.sum() + dbias.sum().to(dtype), g)
    assert kept and all(t.dtype == torch.uint8 for t in kept)
    assert {t.untyped_storage().nbytes() for t in kept} == {x.numel() // 8}
    assert len({t.untyped_storage().data_ptr() for t in kept}) == 1
    assert kept[0].untyped_storage().nbytes() * 32 == x.numel() * 4


@needs_core
def test_bits_are_in_memory_order() -> None:
    x, _ = inputs((2, 3, 5, 7), layout=torch.channels_last)
    _, bits = torch.ops.gas_engine.bias_leaky_relu(x, None, 0.2, True)
    signs = (bits[:, None] >> torch.arange(8)) & 1
    expected = (x.permute(0, 2, 3, 1).flatten() > 0).byte()
    assert torch.equal(signs.flatten()[:210], expected) and not signs.flatten()[210:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_and_strides(device: str) -> None:
    x, bias = inputs((2, 24, 6, 10), device=device)
    expected = ops.bias_leaky_relu(x, bias)
    for other in (x.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([x, x], -1)[..., 0], x.flip(0).flip(0)):
        torch.testing.assert_close(ops.bias_leaky_relu(other, bias), expected, rtol=0, atol=0)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.bias_leaky_relu(last, torch.stack([bias, bias], 1)[:, 0])
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    # The cotangent's layout need not be that of the bits.
    g = draw(torch.Generator().manual_seed(3), (2, 24, 6, 10), device=device)
    for cotangent in (g, g.contiguous(memory_format=torch.channels_last)):
        got = torch.autograd.grad(y, (last, bias), cotangent, retain_graph=True)
        want = torch.autograd.grad(expected, (x, bias), cotangent, retain_graph=True)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
        torch.testing.assert_close(got[1], want[1])
    shifted = torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view(x.shape)  # not aligned
    torch.testing.assert_close(ops.bias_leaky_relu(shifted, bias.detach()), expected, rtol=0, atol=0)


def test_bias_of_another_dtype() -> None:
    x, _ = inputs((2, 3, 5), torch.bfloat16)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = ops.bias_leaky_relu(x, bias)
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.float().sum(), bias)
    assert grad.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.bias_leaky_relu(x.float(), bias).dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@needs_core
def test_opcheck(device: str) -> None:
    library = torch.ops.gas_engine
    for shape, layout in (((2, 3, 5, 7), torch.contiguous_format), ((1, 8, 4, 2), torch.channels_last), ((3, 5), None)):
        last = layout is torch.channels_last
        x, bias = inputs(shape, torch.float32, device, layout or torch.contiguous_format)
        torch.library.opcheck(library.bias_leaky_relu.default, (x, bias, 0.2, last))
        torch.library.opcheck(library.bias_leaky_relu.default, (x, None, 0.2, last))
        bits = library.bias_leaky_relu(x, bias, 0.2, last)[1]
        torch.library.opcheck(library.bias_leaky_relu_masked.default, (x, bias, bits, 0.2, last))
        torch.library.opcheck(library.bias_leaky_relu_masked.default, (x, None, bits, 0.2, last))
        torch.library.opcheck(library.bias_leaky_relu_backward.default, (x, bits, 0.2, last))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 5, 129, 97), torch.contiguous_format),
        ((3, 100, 33, 17), torch.channels_last),
        ((8, 768, 4, 4), torch.contiguous_format),
        ((70_001, 3), torch.contiguous_format),
    ],
    ids=str,
)
@needs_core
def test_bits_do_not_depend_on_run_or_threads(shape: tuple[int, ...], layout: torch.memory_format, device: str) -> None:
    x, bias = inputs(shape, device=device, layout=layout)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            y = ops.bias_leaky_relu(x, bias)
            results.append((y, *torch.autograd.grad(y, (x, bias), x.detach())))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def test_compile_fullgraph() -> None:
    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return ops.bias_leaky_relu(x, bias).square().sum()

    for layout in (torch.contiguous_format, torch.channels_last):
        arguments = inputs((2, 3, 5, 7), layout=layout)
        eager = torch.autograd.grad(loss(*arguments), arguments)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for got, want in zip(torch.autograd.grad(compiled(*arguments), arguments), eager, strict=True):
            torch.testing.assert_close(got, want)


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 5, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        y = ops.bias_leaky_relu(x, torch.empty(3))
    assert y.stride() == x.stride() and y.dtype == torch.bfloat16


def test_any_slope_compiles() -> None:
    x = torch.randn(2, 3, 4)
    compiled = torch.compile(lambda x, slope: ops.bias_leaky_relu(x, slope=slope), backend="aot_eager", fullgraph=True)
    for slope in (0.2, 0.1, 0.3):
        torch.testing.assert_close(compiled(x, slope), ops.bias_leaky_relu(x, slope=slope))


@pytest.mark.parametrize("shape", [(4, 2, 3, 8), (4, 2, 3, 5), (4, 1, 3, 2, 4)])
def test_vmap(shape: tuple[int, ...]) -> None:
    x, _ = (t.detach() for t in inputs(shape))
    shared, own = torch.randn(3), torch.randn(4, 3)

    for bias, dim in ((shared, None), (own, 0)):
        got = torch.func.vmap(ops.bias_leaky_relu, (0, dim))(x, bias)
        want = torch.stack([ops.bias_leaky_relu(x[i], bias if dim is None else bias[i]) for i in range(4)])
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    got = torch.func.vmap(ops.bias_leaky_relu, in_dims=1, out_dims=1)(x.transpose(0, 1).contiguous())
    torch.testing.assert_close(got, ops.bias_leaky_relu(x).transpose(0, 1), rtol=0, atol=0)
    # Batches of cotangents meet bits that are not batched.
    leaf, bias = x[0].clone().requires_grad_(), shared.clone().requires_grad_()
    y = ops.bias_leaky_relu(leaf, bias)
    g = torch.randn(5, *y.shape)
    got = torch.autograd.grad(y, (leaf, bias), g, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, (leaf, bias), g[i], retain_graph=True) for i in range(5)]
    for k in range(2):
        torch.testing.assert_close(got[k], torch.stack([e[k] for e in each]), rtol=0, atol=0)
    (got,) = torch.autograd.grad(y, leaf, g, is_grads_batched=True)
    torch.testing.assert_close(got, torch.stack([e[0] for e in each]), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=2, max_size=5).map(tuple),
    dtype=st.sampled_from(DTYPES),
    order=st.randoms(use_true_random=False),
)
def test_any_shape_and_stride(shape: tuple[int, ...], dtype: torch.dtype, order) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x = draw(torch.Generator().manual_seed(4), shape, dtype).permute(axes).requires_grad_()
    bias = draw(torch.Generator().manual_seed(5), (x.shape[1],), dtype, requires_grad=True)
    y, twin = ops.bias_leaky_relu(x, bias), ops.bias_leaky_relu_reference(x.double(), bias.double())
    assert_close(y, twin, TOLERANCE[dtype])
    got, want = (torch.autograd.grad(v.sum(), (x, bias)) for v in (y, twin))
    assert_close(got[0], want[0], TOLERANCE[dtype])
    torch.testing.assert_close(got[1], want[1])


X = torch.zeros(2, 3)
B = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "seen"),
    [
        (lambda: ops.bias_leaky_relu([1.0]), TypeError, "got list"),
        (lambda: ops.bias_leaky_relu(X.int()), TypeError, "got torch.int32"),
        (lambda: ops.bias_leaky_relu(X, B.int()), TypeError, "got torch.int32"),
        (lambda: ops.bias_leaky_relu(X, 1.0), TypeError, "got float"),
        (lambda: ops.bias_leaky_relu(X, B[:2]), ValueError, r"bias must be \[3\].*got \[2\]"),
        (lambda: ops.bias_leaky_relu(X, X), ValueError, r"got \[2, 3\]"),
        (lambda: ops.bias_leaky_relu(B, B), ValueError, r"got \[3\]"),
        (lambda: ops.bias_leaky_relu(X, B.to("meta")), ValueError, "got meta"),
        (lambda: ops.bias_leaky_relu(X, slope=float("nan")), ValueError, "got nan"),
        (lambda: ops.bias_leaky_relu(X, slope=float("inf")), ValueError, "got inf"),
        (lambda: ops.bias_leaky_relu(X, slope=B), ValueError, "finite number"),
    ],
)
def test_refusals(call, error: type[Exception], seen: str) -> None:
    with pytest.raises(error, match=seen):
        call()


@needs_core
def test_bare_ops_check_too() -> None:
    library, bits = torch.ops.gas_engine, torch.zeros(1, dtype=torch.uint8)
    for call in (
        lambda: library.bias_leaky_relu(X, B[:1], 0.2, False),
        lambda: library.bias_leaky_relu(X, B.double(), 0.2, False),
        lambda: library.bias_leaky_relu(X, None, 0.2, True),
        lambda: library.bias_leaky_relu_masked(X[:, :2].repeat(1, 9), None, bits, 0.2, False),
        lambda: library.bias_leaky_relu_masked(X, None, bits.float(), 0.2, False),
        lambda: library.bias_leaky_relu_backward(B, bits, 0.2, False),
    ):
        with pytest.raises((ValueError, TypeError), match="got"):
            call()
