"""conv_frozen is PyTorch's convolution to the bit, and keeps nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kept import kept_bytes
from torch import Tensor

from gas_engine import ops
from gas_engine.ops.conv_frozen import conv_frozen_samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_same_bits_and_strides_as_pytorch(dtype: torch.dtype) -> None:
    for sample in conv_frozen_samples(dtype, requires_grad=True):
        x = sample.args[0]
        ours, theirs = (
            ops.conv_frozen(*sample.args, **sample.kwargs),
            ops.conv_frozen_reference(*sample.args, **sample.kwargs),
        )
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
        g = torch.randn_like(theirs)
        (got,), (want,) = torch.autograd.grad(ours, x, g), torch.autograd.grad(theirs, x, g)
        assert torch.equal(got, want) and got.stride() == want.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_keeps_no_byte(layout: torch.memory_format) -> None:
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(8, 8, 3, 3), torch.randn(8)
    assert kept_bytes(lambda: ops.conv_frozen(x * 1, weight, bias, padding=1), weight, bias) == 0
    assert kept_bytes(lambda: F.conv2d(x * 1, weight, bias, padding=1), weight, bias) == x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)], ids=str)
def test_linear_needs_no_such_op(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Nor do matrix products: with a constant matrix PyTorch keeps nothing of x."""
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    matrix, bias = torch.randn(4, 8, dtype=dtype), torch.randn(4, dtype=dtype)
    assert kept_bytes(lambda: F.linear(x * 1, matrix, bias), matrix) == 0
    assert kept_bytes(lambda: F.linear(x * 1, matrix), matrix) == 0
    assert kept_bytes(lambda: (x * 1) @ matrix.t(), matrix) == 0


def test_autocast_as_pytorch() -> None:
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = ops.conv_frozen(x, weight), F.conv2d(x, weight)
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
        assert ops.conv_frozen(x.double(), weight.double()).dtype == torch.float64  # as PyTorch's autocast


def test_refusals() -> None:
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"weight wants a gradient.*requires_grad_"):
        ops.conv_frozen(x, weight)
    with torch.no_grad():
        ops.conv_frozen(x, weight)
    with pytest.raises(ValueError, match="must be numbers, got 'same'"):
        ops.conv_frozen(x, weight.detach(), padding="same")
    for bad in (x[0], x[None, None]):
        with pytest.raises(ValueError, match=r"1 to 3 spatial dimensions.*got \["):
            ops.conv_frozen(bad, weight.detach())
    with pytest.raises(NotImplementedError, match="map over x"):
        torch.func.vmap(lambda w: _convolve(x, w))(weight.detach()[None])


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return ops.conv_frozen(x, weight)
