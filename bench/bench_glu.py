"""What the gated units buy over PyTorch's chunk, activation and product: forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from devices import sizes_on_devices
from torch import Tensor

from gas_engine import ops


def stock_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def stock_silu_mul(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "device"), sizes_on_devices(["1024x2560"], ["16384x10240"]))
@pytest.mark.parametrize("op", ["geglu", "silu_mul"])
def bench_glu(compare: Callable[..., None], smoke: bool, op: str, size: str, dtype: torch.dtype, device: str) -> None:
    shape = (
        (3, 10) if smoke else tuple(map(int, size.split("x")))
    )  # the feed-forward of SD 1.5 at 32x32, and a large one
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    g = torch.randn(shape[0], shape[1] // 2).to(device, dtype)

    def both(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(function(x), x, g)

    stock = stock_geglu if op == "geglu" else stock_silu_mul
    callables = {"native": both(getattr(ops, op)), "stock": both(stock)}
    moved = {"native": 3 * x.nbytes + 2 * g.nbytes, "stock": 0}  # x, y; x, g, dx
    compare("ops", callables, 30, device, moved, op=op, J="", size=size, dtype=str(dtype)[6:])
