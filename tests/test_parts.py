"""A decoder's layers on parts that are never joined, against the same layers on the joined tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from twin import relative

from gas_engine.memory import ByteTracker
from gas_engine.memory._parts import conv_of_parts, norm_of_parts
from gas_engine.ops import conv_frozen, group_norm_silu

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def parts_of(channels, batch=2, size=(5, 7), dtype=torch.float64, layout="contiguous"):
    torch.manual_seed(0)
    return [
        torch.randn(batch, c, *size).to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        for c in channels
    ]


def both(function, joined, parts):
    """Value and gradients of a function of the parts, and of one of the joined tensor."""
    results = []
    for value in (function(parts), joined(torch.cat(parts, 1))):
        g = torch.linspace(-1, 1, value.numel()).to(value.dtype).reshape(value.shape)
        results.append([value, *torch.autograd.grad(value, parts, g)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "groups"), [((8, 16), 6), ((4, 8, 12), 6), ((8, 16), 5 * 24), ((8, 4), 2), ((6, 10), 4)]
)
@pytest.mark.parametrize("act", ["silu", "none"])
def test_norms_have_the_same_bits(channels, groups, dtype, layout, act) -> None:
    """With groups of one part, with groups across two, and with groups that are none, which are refused."""
    parts, total = parts_of(channels, dtype=dtype, layout=layout), sum(channels)
    weight, bias = torch.randn(2, total)
    if total % groups:
        with pytest.raises(ValueError, match="num_groups must divide the channels"):
            norm_of_parts(parts, groups, weight, bias, 1e-5, act)
        return
    norms = (
        lambda p: norm_of_parts(p, groups, weight, bias, 1e-5, act),
        lambda x: group_norm_silu(x, groups, weight, bias, 1e-5, act=act),
    )
    for got, wanted in both(*norms, parts):
        assert torch.equal(got, wanted) and got.dtype == dtype


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_norms_of_any_batch_without_weights(batch, size) -> None:
    parts = parts_of((4, 8), batch=batch, size=size)
    norms = (
        lambda p: norm_of_parts(p, 3, None, None, 1e-5, "silu"),
        lambda x: group_norm_silu(x, 3, act="silu"),
    )
    assert all(torch.equal(got, wanted) for got, wanted in both(*norms, parts))


@pytest.mark.parametrize(("layout", "copied"), [("contiguous", 1), ("channels_last", 1.5)])
def test_norms_keep_the_parts_alone_and_never_two_wholes(layout, copied) -> None:
    """With channels last a part is copied into its place, else it is written there."""
    parts = parts_of((8, 8), batch=4, size=(16, 16), dtype=torch.float32, layout=layout)
    with ByteTracker() as bytes:
        y = norm_of_parts(parts, 4, torch.ones(16), torch.zeros(16), 1e-5, "silu")
        assert bytes.live <= y.nbytes + 1024 and bytes.peak <= copied * y.nbytes + 1024
        bytes.reset_peak()
        g = torch.autograd.grad(y, parts, torch.ones_like(y))
        assert bytes.peak <= 2 * y.nbytes + sum(t.nbytes for t in g) + 1024
    assert all(a.stride() == b.stride() for a, b in zip(g, parts, strict=True))


def test_fake_parts_have_a_fake_norm() -> None:
    """Also where no mode says so: nothing of the size of a network is ever allocated to plan it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = [torch.randn(1, 2**8, 2**14, 2**14, requires_grad=True) for _ in range(2)]
    with ByteTracker() as bytes:
        y = norm_of_parts(parts, 32, torch.ones(2**9), torch.zeros(2**9), 1e-5, "silu")
    assert isinstance(y, FakeTensor) and bytes.peak <= 1.5 * y.nbytes + 2**13


def test_norms_under_transforms() -> None:
    parts, weight = parts_of((4, 8)), torch.rand(12)
    plain = lambda *p: norm_of_parts(p, 3, weight, weight, 1e-5, "silu")  # noqa: E731
    y = plain(*parts)
    several = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, parts, several, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(several):
        for got, wanted in zip(batched, torch.autograd.grad(y, parts, g, retain_graph=True), strict=True):
            assert relative(got[i], wanted) < 1e-14
    mapped = torch.vmap(plain)(*(torch.stack([p, 2 * p]) for p in parts))
    assert torch.equal(mapped[0], y)
    assert relative(torch.func.grad(lambda *p: plain(*p).sum())(*parts), torch.autograd.grad(y.sum(), parts)[0]) < 1e-14


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([torch.ones(1, 4, 3, 3), torch.ones(2, 4, 3, 3)], "Sizes of tensors must match"),
        ([torch.ones(1, 4, 1, 1), torch.ones(1, 4, 3, 3)], "Sizes of tensors must match"),
    ],
)
def test_parts_that_cannot_be_joined_are_refused(parts, error) -> None:
    with pytest.raises(RuntimeError, match=error):
        norm_of_parts(parts, 2, torch.ones(8), torch.ones(8), 1e-5, "silu")


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_trainable_weights_are_refused(name) -> None:
    small = {key: torch.ones(12).requires_grad_(key == name) for key in ("weight", "bias")}
    with pytest.raises(RuntimeError, match=f"{name} wants a gradient"):
        norm_of_parts(parts_of((4, 8)), 3, small["weight"], small["bias"], 1e-5, "silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-15), (torch.float32, 3e-7), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize("channels", [(8, 16), (3, 5, 7), (64, 96)])
def test_projections(channels, dtype, most, layout) -> None:
    parts, bias = parts_of(channels, dtype=dtype, layout=layout), torch.randn(9).to(dtype)
    weight = torch.randn(9, sum(channels), 1, 1).to(dtype)

    def joined(x: Tensor) -> Tensor:
        return conv_frozen(x, weight, bias)

    found = [*both(lambda p: conv_of_parts(p, weight, bias), joined, parts)]
    assert all(relative(got, wanted) <= most for got, wanted in found)
    assert found[0][0].stride() == found[0][1].stride()


def test_projections_of_an_empty_batch() -> None:
    parts = parts_of((4, 8), batch=0)
    y = conv_of_parts(parts, torch.ones(9, 12, 1, 1, dtype=torch.float64), None)
    grads = torch.autograd.grad(y.sum(), parts)
    assert y.shape == (0, 9, 5, 7) and [g.shape for g in grads] == [p.shape for p in parts]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_part_alone_is_not_copied(dtype) -> None:
    (part,) = parts_of((8,), batch=4, size=(16, 16), dtype=dtype)
    weight = torch.ones(8, 8, 1, 1, dtype=dtype)
    with ByteTracker() as bytes:
        y = conv_of_parts([part], weight, None)
        assert y.nbytes <= bytes.peak <= y.nbytes + 1024
