"""`group_norm_silu` against its twin in float64 and against PyTorch's own ops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import DEVICES
from torch import Tensor
from torch.autograd import gradcheck

from gas_engine import ops
from gas_engine.ops import _native
from gas_engine.ops._samples import Sample
from gas_engine.ops._samples import group_norm_silu_samples as samples

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One rounding to storage, plus the arithmetic.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ACTS = ["silu", "gelu", "gelu_tanh", "none"]
needs_core = pytest.mark.skipif(_native.native is None, reason="the native core is off: the twins promise less")


def parts(sample: Sample) -> Iterator[Tensor]:
    """The tensors of a sample that want a gradient."""
    yield from (t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, Tensor) and t.requires_grad)


def wide(sample: Sample) -> Sample:
    def convert(v: object) -> object:
        return v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v

    return Sample(tuple(map(convert, sample.args)), {k: convert(v) for k, v in sample.kwargs.items()})


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0) -> None:
    """Relative L2, and the signed bias, which a few outliers do not hide."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    difference, size = actual.double() - expected, max(expected.norm().item(), floor, 1e-30)
    assert difference.norm() <= tolerance * size, f"relative error {difference.norm() / size:.1e}"
    assert difference.sum().abs() <= tolerance * size * expected.numel() ** 0.5


def gradients(function: Callable[..., Tensor], sample: Sample, g: Tensor) -> tuple[Tensor, ...]:
    out = function(*sample.args, **sample.kwargs)
    return (out, *torch.autograd.grad(out, list(parts(sample)), g))


def sized(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_against_the_twin(dtype: torch.dtype, device: str) -> None:
    for sample in samples(dtype, device, requires_grad=True):
        out = ops.group_norm_silu(*sample.args, **sample.kwargs)
        assert out.dtype == dtype and out.stride() == sample.args[0].stride()
        g = sized(*out.shape, dtype=dtype, device=device, seed=1)
        actual = gradients(ops.group_norm_silu, sample, g)
        expected = gradients(ops.group_norm_silu_reference, wide(sample), g.double())
        # Where a group is one number its gradient is zero, but for rounding, times rstd = 316: judged by the size of g.
        for got, want, like in zip(actual, expected, (out, *parts(sample)), strict=True):
            assert got.dtype == dtype and got.shape == like.shape
            assert_near(got, want, TOLERANCE[dtype], floor=0.5 * g.double().norm().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", FORMATS)
def test_against_pytorch(layout: str, act: str, device: str) -> None:
    """The forms that networks write: act(group_norm(x)), and ADM's addcmul(shift, norm(x), scale + 1)."""
    x, weight, bias = sized(3, 64, 9, 7, device=device), sized(64, device=device), sized(64, device=device, seed=2)
    x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
    scale, shift = sized(3, 128, 1, 1, device=device, seed=3).requires_grad_().chunk(2, dim=1)
    activation = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
    activation = activation.get(act, lambda y: y)
    plain = activation(F.group_norm(x, 16, weight, bias))
    torch.testing.assert_close(ops.group_norm_silu(x, 16, weight, bias, act=act), plain, rtol=1e-5, atol=1e-5)
    expected = activation(torch.addcmul(shift, F.group_norm(x, 16, weight, bias), scale + 1))
    actual = ops.group_norm_silu(x, 16, weight, bias, scale=scale, shift=shift, act=act)
    assert actual.is_contiguous(memory_format=FORMATS[layout])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    g = sized(*x.shape, device=device, seed=4)
    for got, want in zip(
        torch.autograd.grad(actual, (x, scale, shift), g),
        torch.autograd.grad(expected, (x, scale, shift), g),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_core
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", FORMATS)
def test_layouts(layout: str, device: str) -> None:
    """Slices, transposes, expanded and misaligned tensors, large groups and few, give the same numbers."""
    x = sized(2, 40, 30, 50, device=device).contiguous(memory_format=FORMATS[layout])
    want = ops.group_norm_silu_reference(x.double(), 5)
    for t in (x, torch.stack([x, x], dim=-1)[..., 0], x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_near(ops.group_norm_silu(t, 5), want, 1e-6)
    misaligned = torch.cat([x.flatten()[:1], x.contiguous().flatten()])[1:].view(x.shape)
    assert_near(ops.group_norm_silu(misaligned, 5), want, 1e-6)
    repeated = x[:1, :, :1, :1].expand(2, 40, 30, 50)
    assert_near(ops.group_norm_silu(repeated, 8), ops.group_norm_silu_reference(repeated.double(), 8), 1e-6)
    y = x.clone().requires_grad_()
    (dense,) = torch.autograd.grad(ops.group_norm_silu(y, 5), y, x)
    (other,) = torch.autograd.grad(ops.group_norm_silu(y, 5), y, x.contiguous().transpose(2, 3).contiguous().mT)
    torch.testing.assert_close(dense, other, rtol=0, atol=0)
    (got,) = torch.autograd.grad(ops.group_norm_silu(y, 5).sum(), y)  # the cotangent is one number, expanded
    z = x.double().requires_grad_()
    assert_near(got, torch.autograd.grad(ops.group_norm_silu_reference(z, 5).sum(), z)[0], 2e-6)


@needs_core
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", FORMATS)
def test_mean_far_larger_than_deviation(layout: str, device: str) -> None:
    x = (1e4 + sized(2, 8, 33, 31, device=device)).contiguous(memory_format=FORMATS[layout])
    want = ops.group_norm_silu_reference(x.double(), 2, act="none")
    assert_near(ops.group_norm_silu(x, 2, act="none"), want, 1e-3)  # x - mean: the mean is rounded to 5e-4
    x[0, 0, 0, 0] = -1e5  # an outlier first, where a shifted sum would take its shift from
    want = ops.group_norm_silu_reference(x.double(), 2, act="none")
    assert_near(ops.group_norm_silu(x, 2, act="none"), want, 1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device: str) -> None:
    weight, bias = sized(6, dtype=torch.float64, device=device), sized(6, dtype=torch.float64, device=device, seed=1)
    for act in ACTS:
        for fmt in FORMATS.values():
            x = sized(2, 6, 3, 2, dtype=torch.float64, device=device).contiguous(memory_format=fmt).requires_grad_()
            scale, shift = (sized(2, 6, dtype=torch.float64, device=device, seed=s).requires_grad_() for s in (2, 3))
            assert gradcheck(
                lambda x, s, t, act=act: ops.group_norm_silu(x, 3, weight, bias, scale=s, shift=t, act=act),
                (x, scale, shift),
            )


@needs_core
@pytest.mark.parametrize("asked", ["x", "scale", "shift"])
def test_each_gradient_alone(asked: str) -> None:
    tensors = {"x": sized(2, 6, 5), "scale": sized(2, 6, seed=1), "shift": sized(2, 6, seed=2)}
    tensors[asked].requires_grad_()

    def run(function: Callable[..., Tensor]) -> Tensor:
        return function(tensors["x"], 2, scale=tensors["scale"], shift=tensors["shift"])

    g = sized(2, 6, 5, seed=3)
    (got,), (want,) = (
        torch.autograd.grad(run(f), tensors[asked], g) for f in (ops.group_norm_silu, ops.group_norm_silu_reference)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_mixed_dtypes() -> None:
    x, scale = sized(2, 6, 5, dtype=torch.bfloat16).requires_grad_(), sized(2, 6, seed=1).requires_grad_()
    weight = sized(6, dtype=torch.float64, seed=2)
    for function in (ops.group_norm_silu, ops.group_norm_silu_reference):
        out = function(x, 2, weight, scale=scale)
        dx, dscale = torch.autograd.grad(out.float().square().sum(), (x, scale))
        assert out.dtype == dx.dtype == torch.bfloat16 and dscale.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.float16):
        assert ops.group_norm_silu(x, 2, weight, scale=scale).dtype == torch.bfloat16


def kept_bytes(function: Callable[..., Tensor], *args: object, **kwargs: object) -> int:
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*args, **kwargs)
    assert out.requires_grad
    return sum(storages.values())


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_kept(dtype: torch.dtype) -> None:
    """A third of what stock PyTorch keeps when modulated, half when not."""
    x = sized(2, 64, 32, 32, dtype=dtype).requires_grad_()
    weight, bias, scale, shift = (sized(*n, dtype=dtype) for n in ((64,), (64,), (2, 64, 1, 1), (2, 64, 1, 1)))
    scale.requires_grad_(), shift.requires_grad_()
    small = x.nbytes // 16

    def plain(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 32, weight, bias))

    def adaptive(x: Tensor) -> Tensor:
        return F.silu(torch.addcmul(shift, F.group_norm(x, 32, weight, bias), scale + 1))

    for stock, times, options in ((plain, 2, {}), (adaptive, 3, {"scale": scale, "shift": shift})):
        assert abs(kept_bytes(stock, x) - times * x.nbytes) < small
        assert abs(kept_bytes(ops.group_norm_silu, x, 32, weight, bias, **options) - x.nbytes) < small


@pytest.mark.parametrize("device", DEVICES)
@needs_core
def test_opcheck(device: str) -> None:
    op, backward = (getattr(torch.ops.gas_engine, n).default for n in ("group_norm_silu", "group_norm_silu_backward"))
    for dtype in (torch.float32, torch.bfloat16):
        for fmt in FORMATS.values():
            x = sized(2, 12, 5, 3, dtype=dtype, device=device).contiguous(memory_format=fmt).requires_grad_()
            scale = sized(2, 12, device=device).requires_grad_()
            weight = sized(12, dtype=dtype, device=device)
            torch.library.opcheck(op, (x, 4, weight, None, scale, None, 1e-5, "gelu"))
            _, mean, rstd = op(x.detach(), 4, weight, None, scale, None, 1e-5, "gelu")
            frozen = (x.detach(), mean, rstd, 4, weight, None, scale.detach(), None, 1e-5, "gelu")
            for wanted in ([True, True, False], [False, True, False], [True, False, False]):
                torch.library.opcheck(backward, (x.detach(), *frozen, wanted))


@pytest.mark.parametrize("device", DEVICES)
@needs_core
def test_bits_do_not_depend_on_run_or_threads(device: str) -> None:
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        for fmt in FORMATS.values():
            x = sized(3, 48, 31, 33, dtype=dtype, device=device).contiguous(memory_format=fmt).requires_grad_()
            scale, shift = (sized(3, 48, device=device, seed=s).requires_grad_() for s in (1, 2))
            sample = Sample((x, 6), {"scale": scale, "shift": shift})
            results = []
            try:
                for count in (1, 2, 3, 3):
                    torch.set_num_threads(count)
                    results.append(gradients(ops.group_norm_silu, sample, x.detach()))
            finally:
                torch.set_num_threads(threads)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_large_tensors_go_around_the_caches() -> None:
    """Above 8 MiB the host writes streams; both of its ways to find dy, kept and recomputed, agree with the twin."""
    for groups in (32, 1):
        x = sized(2, 32, 256, 160).requires_grad_()
        sample = Sample((x, groups), {"scale": sized(2, 32).requires_grad_()})
        actual = gradients(ops.group_norm_silu, sample, x.detach())
        expected = gradients(ops.group_norm_silu_reference, wide(sample), x.detach().double())
        for got, want in zip(actual, expected, strict=True):
            assert_near(got, want, 2e-6)


@pytest.mark.parametrize("shape", [(4, 12, 5, 3), (4, 12)])
def test_compile_fullgraph(shape: tuple[int, ...]) -> None:
    weight = sized(12)

    def loss(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.group_norm_silu(x * 2, 4, weight, scale=scale, shift=shift).square().sum()

    inputs = [sized(*shape).requires_grad_(), sized(4, 12, seed=1).requires_grad_(), sized(4, 12, seed=2)]
    inputs[2].requires_grad_()
    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs), inputs)
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want)


def test_vmap() -> None:
    x, scale, shift = sized(2, 3, 6, 5), sized(6, 3, 2, seed=1), sized(3, 6, seed=2)
    weight = sized(6, seed=3)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        return ops.group_norm_silu(x, 2, weight, scale=scale, shift=shift)

    got = torch.func.vmap(run, in_dims=(0, 2))(x, scale.transpose(0, 1))
    want = torch.stack([run(x[i], scale[..., i].T) for i in range(2)])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.func.vmap(run, in_dims=(None, 2))(x[0], scale.transpose(0, 1)),
        torch.stack([run(x[0], scale[..., i].T) for i in range(2)]),
    )
    x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_()
    g = sized(2, 3, 6, 5, seed=4)
    got = torch.autograd.grad(torch.func.vmap(run, in_dims=(0, 2))(x, scale.transpose(0, 1)), (x, scale, shift), g)
    want = torch.autograd.grad(torch.stack([run(x[i], scale[..., i].T) for i in range(2)]), (x, scale, shift), g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    # The backward pass under vmap: many cotangents at once.
    out, many = run(x[0], scale[..., 0].T), sized(5, 3, 6, 5, seed=5)
    got = torch.autograd.grad(out, (x, scale), many, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, (x, scale), m, retain_graph=True) for m in many]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


@needs_core
def test_vmap_over_constants_says_so() -> None:
    x, weights = sized(3, 6, 5), sized(2, 6)
    with pytest.raises(NotImplementedError, match="vmap over weight or bias"):
        torch.func.vmap(lambda w: ops.group_norm_silu(x, 2, w))(weights)


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 6, 4, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        out = ops.group_norm_silu(x, 3, scale=torch.empty(2, 6))
    assert out.stride() == x.stride() and out.dtype == torch.bfloat16


@settings(max_examples=80, deadline=None)
@given(
    groups=st.integers(1, 5),
    in_group=st.integers(1, 9),
    batch=st.integers(0, 3),
    rest=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(ACTS),
    last=st.booleans(),
)
def test_any_shape(
    groups: int, in_group: int, batch: int, rest: list[int], dtype: torch.dtype, act: str, last: bool
) -> None:
    x = sized(batch, groups * in_group, *rest, dtype=dtype)
    if last and len(rest) == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    sample = Sample((x.requires_grad_(), groups), {"shift": sized(batch, groups * in_group, seed=1), "act": act})
    g = sized(*x.shape, dtype=dtype, seed=2)
    out, dx = gradients(ops.group_norm_silu, sample, g)
    want, d_want = gradients(ops.group_norm_silu_reference, wide(sample), g.double())
    assert_near(out, want, 2 * TOLERANCE[dtype])
    # rstd is up to 1 / sqrt(eps) = 316 where a group's numbers are close: that much is rounding in dx worth.
    assert_near(dx, d_want, 2 * TOLERANCE[dtype], floor=10 * g.double().norm().item())


X, S = torch.zeros(2, 6, 4), torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("call", "error", "seen"),
    [
        (lambda: ops.group_norm_silu([1.0], 1), TypeError, "got list"),
        (lambda: ops.group_norm_silu(X[0, 0], 1), ValueError, r"got \[4\]"),
        (lambda: ops.group_norm_silu(X.int(), 1), TypeError, "x must be float32.*got torch.int32"),
        (lambda: ops.group_norm_silu(X, 4), ValueError, "got 4 for 6 channels"),
        (lambda: ops.group_norm_silu(X, 0), ValueError, "got 0 for 6 channels"),
        (lambda: ops.group_norm_silu(X, 2.0), TypeError, "got float"),
        (lambda: ops.group_norm_silu(X, 2, S), ValueError, r"weight must have shape \[6\], got \[2, 6\]"),
        (lambda: ops.group_norm_silu(X, 2, bias=S[0].int()), TypeError, "bias must be float32.*torch.int32"),
        (lambda: ops.group_norm_silu(X, 2, bias=3.0), TypeError, "got float"),
        (lambda: ops.group_norm_silu(X, 2, scale=S[:1]), ValueError, r"scale must be \[2, 6\].*got \[1, 6\]"),
        (lambda: ops.group_norm_silu(X, 2, scale=X), ValueError, r"got \[2, 6, 4\]"),
        (lambda: ops.group_norm_silu(X, 2, shift=1.0), TypeError, "got float"),
        (lambda: ops.group_norm_silu(X, 2, shift=S.to("meta")), ValueError, "got shift on meta"),
        (lambda: ops.group_norm_silu(X, 2, act="relu"), ValueError, "got 'relu'"),
        (lambda: ops.group_norm_silu(X, 2, S[0].clone().requires_grad_()), RuntimeError, "freeze it"),
        (lambda: ops.group_norm_silu(X, 2, bias=S[0].clone().requires_grad_()), RuntimeError, "call the twin"),
    ],
)
def test_refusals(call: Callable[[], object], error: type[Exception], seen: str) -> None:
    with pytest.raises(error, match=seen):
        call()


def test_trainable_affine_is_fine_without_grad_mode() -> None:
    with torch.no_grad():
        ops.group_norm_silu(X, 2, S[0].clone().requires_grad_())


@needs_core
def test_no_second_derivative() -> None:
    x = sized(2, 6, 4).requires_grad_()
    (dx,) = torch.autograd.grad(ops.group_norm_silu(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no derivative of its own"):
        dx.sum().backward()


@needs_core
def test_bare_op_checks_too() -> None:
    op = torch.ops.gas_engine.group_norm_silu
    with pytest.raises(ValueError, match="got 4 for 6 channels"):
        op(X, 4, None, None, None, None, 1e-5, "silu")
    with pytest.raises(ValueError, match=r"got \[2, 6, 4\]"):
        op(X, 2, None, None, X, None, 1e-5, "silu")
    with pytest.raises(RuntimeError, match="freeze it"):
        op(X, 2, S[0].clone().requires_grad_(), None, None, None, 1e-5, "silu")
    with pytest.raises(ValueError, match="got 'relu'"):
        op(X, 2, None, None, None, None, 1e-5, "relu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (3, 64, 33, 31), (1, 512, 32, 32)])
def test_gradient_over_a_joined_input_is_the_same_to_the_bit(device, layout, shape):
    """Where the input is joined anew for the backward pass alone, its memory takes the gradient."""
    from gas_engine.memory import ByteTracker
    from gas_engine.memory._joined import join, keeping_parts

    half = (shape[0], shape[1] // 2, *shape[2:])
    parts = [torch.randn(half, device=device).to(memory_format=layout) for _ in range(2)]
    scale, shift = (torch.randn(shape[:2], device=device, requires_grad=True) for _ in range(2))
    results = []
    for kept in (False, True):
        leaves = [p.clone().requires_grad_() for p in parts]
        inner = [p * 1.0 for p in leaves]
        whole = join(inner)
        with keeping_parts(whole, inner) if kept else contextlib.nullcontext():
            y = ops.group_norm_silu(whole, 4, scale=scale, shift=shift)
        del whole
        g = torch.sin(torch.arange(y.numel(), device=device)).view_as(y).to(memory_format=layout)
        with ByteTracker() as bytes:
            grads = torch.autograd.grad(y, [*leaves, scale, shift], g)
        results.append((grads, bytes.peak))
        # What was lent once is an ordinary tensor from then on.
        again = grads[0].detach().requires_grad_()
        before = again.detach().clone()
        torch.autograd.grad(ops.group_norm_silu(again, 4).sum(), again)
        assert torch.equal(again, before)
    (wanted, stock), (got, spared) = results
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert spared <= stock + 64  # the input again, and no other
