"""bias_leaky_relu against PyTorch's two ops (add, leaky_relu), forward and with its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import sizes_on_devices
from torch import Tensor
from torch.nn import functional as F

from gas_engine import ops
from gas_engine.ops._samples import draw

SHAPES = {"8x384x64x64": (8, 384, 64, 64), "8x768x16x16": (8, 768, 16, 16), "8x768x4x4": (8, 768, 4, 4)}
LARGE = {"32x384x64x64": (32, 384, 64, 64)}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def stock(x: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(x + bias[:, None, None], 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "device"), sizes_on_devices(SHAPES, LARGE))
@pytest.mark.parametrize("what", ["forward", "forward + backward"])
def bench_bias_leaky_relu(
    compare: Callable[..., None], smoke: bool, what: str, size: str, layout: str, dtype: torch.dtype, device: str
) -> None:
    shape = (2, 3, 5, 7) if smoke else (SHAPES | LARGE)[size]
    generator = torch.Generator().manual_seed(0)
    x = draw(generator, shape, dtype, device, True, LAYOUTS[layout])
    bias = draw(generator, shape[1:2], dtype, device, True)
    g = torch.ones_like(x)

    def forward(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(x.detach(), bias.detach())

    def both(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(x, bias), (x, bias), g)

    rounds = 15 if x.numel() > 2**22 else 200
    way = forward if what == "forward" else both
    callables = {
        "native": way(ops.bias_leaky_relu),
        "stock": way(stock),
        "eager twin": way(ops.bias_leaky_relu_reference),
    }
    row = {"op": "bias_leaky_relu", "size": size, "layout": layout, "dtype": str(dtype)[6:], "pass": what}
    bits = x.numel() // 8
    moved = {"native": 2 * x.nbytes if what == "forward" else 4 * x.nbytes + 2 * bits, "stock": 0}  # x, y; g, dx
    compare("ops", callables, rounds, device, moved, **row)
