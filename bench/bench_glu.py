"""What the gated units buy over PyTorch's chunk, activation and product: forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bench_ops import DEVICES
from torch import Tensor

from gas_engine import ops


def stock_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def stock_silu_mul(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["geglu", "silu_mul"])
def bench_glu(compare: Callable[..., None], smoke: bool, op: str, dtype: torch.dtype, device: str) -> None:
    shape = (3, 10) if smoke else (1024, 2 * 1280)  # the feed-forward of SD 1.5 at 32x32
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    g = torch.randn(shape[0], shape[1] // 2).to(device, dtype)

    def both(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(function(x), x, g)

    stock = stock_geglu if op == "geglu" else stock_silu_mul
    callables = {"native": both(getattr(ops, op)), "stock": both(stock)}
    compare("ops", callables, 30, device, op=op, J="", size="x".join(map(str, shape)), dtype=str(dtype)[6:])
