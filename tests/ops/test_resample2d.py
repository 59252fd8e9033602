"""`resample2d` against its twin in float64 and PyTorch's convolutions; its transpose; what it keeps (nothing)."""

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
from gas_engine.ops import _native
from gas_engine.ops._samples import draw
from gas_engine.ops.resample2d import resample2d_samples

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 1e-3}
FACTORS = [(1, 2), (2, 1), (1, 1)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
TAPS = [0.4, 1.0, 3.0, 2.5, -0.5, 0.7, 0.1, 0.3]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    if actual.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"relative error {error:.1e}"


def image(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    return draw(torch.Generator().manual_seed(1), shape, dtype, device, True, layout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, device: str) -> None:
    for (x, taps), factors in resample2d_samples(dtype, device, requires_grad=True):
        twin = x.detach().double().requires_grad_()
        y, expected = ops.resample2d(x, taps, **factors), ops.resample2d_reference(twin, taps, **factors)
        assert y.dtype == dtype
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        assert y.is_contiguous(memory_format=layout)
        assert_close(y, expected, TOLERANCE[dtype])
        with torch.no_grad():
            torch.testing.assert_close(ops.resample2d(x, taps, **factors), y, rtol=0, atol=0)
        g = draw(torch.Generator().manual_seed(2), tuple(y.shape), dtype, device)
        (dx,), (want,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, twin, g.double())
        assert_close(dx, want, TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [(1, 5), (5, 7), (129, 3), (16, 16), (33, 70)], ids=str)
@pytest.mark.parametrize("T", range(1, 9))
def test_against_convolutions(T: int, size: tuple[int, int], layout: torch.memory_format) -> None:
    """The definitions of the public docstring, to the letter; asymmetric taps."""
    x = image((2, 3, *size), torch.float64, layout=layout)
    f = torch.tensor(TAPS[:T], dtype=torch.float64)
    f, p = f / f.sum(), (T - 1) // 2
    kernel = torch.outer(f, f).expand(3, 1, T, T)
    if min(size) + 2 * p >= T:
        for down in (1, 2):
            want = F.conv2d(x, kernel, stride=down, padding=p, groups=3)
            torch.testing.assert_close(ops.resample2d(x, TAPS[:T], 1, down), want)
    want = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=p, output_padding=T % 2, groups=3)
    assert want.shape[2:] == (2 * size[0], 2 * size[1])
    torch.testing.assert_close(ops.resample2d(x, TAPS[:T], 2, 1), want)


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 7), (129, 3), (32, 48)], ids=str)
@pytest.mark.parametrize("T", range(1, 9))
def test_adjointness(T: int, size: tuple[int, int], factors: tuple[int, int]) -> None:
    if factors[0] == 1 and min(size) + 2 * ((T - 1) // 2) < T:
        return
    for layout in LAYOUTS:
        x = image((1, 9, *size), torch.float64, layout=layout)
        y = ops.resample2d(x, TAPS[:T], *factors)
        g = torch.randn_like(y)
        (back,) = torch.autograd.grad(y, x, g)
        forth, back = (y * g).sum().item(), (x * back).sum().item()
        assert abs(forth - back) <= 1e-12 * (y.norm() * g.norm()).item() + 1e-14


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 8])
def test_gradcheck(T: int, factors: tuple[int, int]) -> None:
    for shape, layout in (((1, 2, 3, 5), LAYOUTS[0]), ((1, 2, 4, 3), LAYOUTS[1])):
        x = image(shape, torch.float64, layout=layout)

        def function(x: Tensor) -> Tensor:
            return ops.resample2d(x, TAPS[:T], *factors)

        assert gradcheck(function, x)
        assert gradgradcheck(function, x)


@pytest.mark.parametrize("taps", [[1, 3, 3, 1], (1, 2, 1), torch.tensor([1.0, 1.0])], ids=["1331", "121", "tensor"])
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_a_constant_stays_constant(taps: object, factors: tuple[int, int]) -> None:
    y = ops.resample2d(torch.full((1, 1, 20, 24), 3.0), taps, *factors)
    inside = y[..., 4:-4, 4:-4]
    torch.testing.assert_close(inside, torch.full_like(inside, 3.0))


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_nothing_is_kept(factors: tuple[int, int]) -> None:
    if _native.native is None:
        pytest.skip("the native core is off: the twin keeps what a convolution keeps")
    x = image((2, 3, 8, 8))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.resample2d(x, [1, 3, 3, 1], *factors)
        g = torch.ones_like(y).requires_grad_()
        (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
        torch.autograd.grad(dx.sum(), g)
    assert not kept


@pytest.mark.parametrize("device", DEVICES)
def test_strides_borders_and_infinities(device: str) -> None:
    x = image((2, 20, 6, 10), device=device).detach()
    for factors in FACTORS:
        expected = ops.resample2d(x, TAPS[:4], *factors)
        for other in (x.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([x, x], -1)[..., 0]):
            torch.testing.assert_close(ops.resample2d(other, TAPS[:4], *factors), expected, rtol=0, atol=0)
        last = ops.resample2d(x.contiguous(memory_format=torch.channels_last), TAPS[:4], *factors)
        assert last.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-6)
        shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)  # not aligned to a vector
        torch.testing.assert_close(ops.resample2d(shifted, TAPS[:4], *factors), expected, rtol=0, atol=0)
        # What is not finite stays in its plane, and within reach of the taps.
        for layout in LAYOUTS:
            hot = x.clone()
            hot[0, 7, 3] = float("inf")
            hot[1, 0] = float("nan")
            y = ops.resample2d(hot.contiguous(memory_format=layout), TAPS[:4], *factors)
            clean = torch.ones(2, 20, dtype=torch.bool, device=device)
            clean[0, 7] = clean[1, 0] = False
            torch.testing.assert_close(y[clean], expected[clean], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@needs_core
def test_opcheck(device: str) -> None:
    op = torch.ops.gas_engine.resample2d.default
    for layout in LAYOUTS:
        x = image((2, 3, 6, 7), device=device, layout=layout)
        torch.library.opcheck(op, (x, [0.25, 0.5, 0.25], 1, 2, 1, 3, 4))
        torch.library.opcheck(op, (x, [0.25, 0.75, 0.75, 0.25], 2, 1, 2, 12, 14))
        torch.library.opcheck(op, (x, [0.25, 0.75, 0.75, 0.25], 2, 2, 1, 6, 7))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [(37, 51), (6, 5)], ids=str)
@needs_core
def test_bits_do_not_depend_on_run_or_threads(size: tuple[int, int], layout: torch.memory_format, device: str) -> None:
    x = image((3, 701, *size), device=device, layout=layout)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append([ops.resample2d(x, TAPS[:4], *factors) for factors in FACTORS])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("T", [2, 4, 5])
def test_a_large_result_is_that_of_its_parts(
    T: int, layout: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    """Above 8 MiB the host writes around the caches; parts of it are written through them."""
    channels = 2**22 // (64 * 64 * dtype.itemsize)
    for up, down in FACTORS:
        side = 64 // up * down
        x = draw(torch.Generator().manual_seed(0), (4, channels, side, side), dtype, device, layout=layout)
        whole = ops.resample2d(x, TAPS[:T], up, down)
        assert whole.nbytes >= 2**23
        assert torch.equal(whole, torch.cat([ops.resample2d(part, TAPS[:T], up, down) for part in x.split(1)]))


def test_compile_fullgraph() -> None:
    def loss(x: Tensor) -> Tensor:
        return ops.resample2d(ops.resample2d(x, [1, 3, 3, 1], up=2, down=1), [1, 2, 1]).square().sum()

    for layout in LAYOUTS:
        for dynamic in (False, True):
            x = image((2, 3, 5, 7), layout=layout)
            compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
            (got,), (want,) = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x)
            torch.testing.assert_close(got, want)


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 6, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        y = ops.resample2d(x, [1, 3, 3, 1])
    assert y.shape == (2, 3, 3, 3) and y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_vmap_and_autocast() -> None:
    x = image((4, 2, 3, 6, 7)).detach()
    got = torch.func.vmap(lambda x: ops.resample2d(x, [1, 3, 3, 1]), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(got, ops.resample2d(x.flatten(0, 1), [1, 3, 3, 1]).unflatten(0, (4, 2)), rtol=0, atol=0)
    leaf = x[0].clone().requires_grad_()
    y = ops.resample2d(leaf, [1, 3, 3, 1])
    g = torch.randn(5, *y.shape)
    (got,) = torch.autograd.grad(y, leaf, g, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaf, g[i], retain_graph=True)[0] for i in range(5)]
    torch.testing.assert_close(got, torch.stack(each), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (ops.resample2d, ops.resample2d_reference):
            torch.testing.assert_close(function(x[0], [1, 3, 3, 1]), y.detach(), rtol=1e-5, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    B=st.integers(0, 3),
    C=st.integers(1, 40),
    size=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    T=st.integers(1, 8),
    factors=st.sampled_from(FACTORS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(B, C, size, T, factors, layout, dtype) -> None:
    x = image((B, C, *size), dtype, layout=layout)
    y, twin = (f(v, TAPS[:T], *factors) for f, v in ((ops.resample2d, x), (ops.resample2d_reference, x.double())))
    assert_close(y, twin, TOLERANCE[dtype])
    if B > 0:
        g = torch.ones_like(y)
        (got,), (want,) = torch.autograd.grad(y, x, g), torch.autograd.grad(twin, x, g.double())
        assert_close(got, want.double(), 2 * TOLERANCE[dtype] if dtype.itemsize == 2 else 1e-5)


X = torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "seen"),
    [
        (lambda: ops.resample2d([1.0], [1]), TypeError, "got list"),
        (lambda: ops.resample2d(X.int(), [1]), TypeError, "got torch.int32"),
        (lambda: ops.resample2d(X[0], [1]), ValueError, r"got \[1, 4, 4\]"),
        (lambda: ops.resample2d(X, []), ValueError, "got 0"),
        (lambda: ops.resample2d(X, [1] * 9), ValueError, "got 9"),
        (lambda: ops.resample2d(X, [1, -1]), ValueError, "sum other than zero"),
        (lambda: ops.resample2d(X, [1, float("nan")]), ValueError, "finite sum"),
        (lambda: ops.resample2d(X, torch.ones(2, 2)), ValueError, r"got \[2, 2\]"),
        (lambda: ops.resample2d(X, torch.ones(2, requires_grad=True)), ValueError, "detach"),
        (lambda: ops.resample2d(X, [1], up=2, down=2), ValueError, r"got \(2, 2\)"),
        (lambda: ops.resample2d(X, [1], up=3), ValueError, r"got \(3, 2\)"),
        (lambda: ops.resample2d(X[..., :1], [1, 1]), ValueError, r"got \[4, 1\]"),
    ],
)
def test_refusals(call, error: type[Exception], seen: str) -> None:
    with pytest.raises(error, match=seen):
        call()


@needs_core
def test_bare_ops_check_too() -> None:
    op = torch.ops.gas_engine.resample2d
    for arguments in (
        (X[0], [1.0], 1, 2, 0, 2, 2),
        (X, [1.0] * 9, 1, 2, 0, 2, 2),
        (X, [1.0], 1, 2, 1, 2, 2),
        (X, [1.0], 1, 3, 0, 2, 2),
        (X, [1.0], 1, 2, 0, -1, 2),
    ):
        with pytest.raises(ValueError, match="got"):
            op(*arguments)
