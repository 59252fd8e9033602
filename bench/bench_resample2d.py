"""resample2d against a grouped convolution with the same filter: down and up, forward and with its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import sizes_on_devices
from torch import Tensor
from torch.nn import functional as F

from gas_engine import ops
from gas_engine.ops._samples import draw

# The larger side: x of the way down, y of the way up.
SHAPES = {"8x384x64x64": (8, 384, 64, 64), "8x128x32x32": (8, 128, 32, 32), "8x768x8x8": (8, 768, 8, 8)}
LARGE = {"32x384x64x64": (32, 384, 64, 64)}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# StyleGAN's filter everywhere, and the box at two sizes on the CPU, where it takes another way.
CASES = [
    *(pytest.param("1331", *case.values, marks=case.marks, id=case.id) for case in sizes_on_devices(SHAPES, LARGE)),
    *(pytest.param("11", size, "cpu", id=f"{size}-cpu-box") for size in ("8x384x64x64", "8x128x32x32")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["down", "up"])
@pytest.mark.parametrize(("taps", "size", "device"), CASES)
@pytest.mark.parametrize("what", ["forward", "forward + backward"])
def bench_resample2d(
    compare: Callable[..., None],
    smoke: bool,
    what: str,
    taps: str,
    size: str,
    way: str,
    layout: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    B, C, H, W = (2, 3, 8, 6) if smoke else (SHAPES | LARGE)[size]
    up, down = (1, 2) if way == "down" else (2, 1)
    shape = (B, C, H // up, W // up)
    x = draw(torch.Generator().manual_seed(0), shape, dtype, device, True, LAYOUTS[layout])
    numbers = [float(digit) for digit in taps]
    f = up * torch.tensor(numbers) / sum(numbers)
    kernel = torch.outer(f, f).to(device, dtype).expand(C, 1, -1, -1).contiguous()
    padding = (len(numbers) - 1) // 2

    def native(x: Tensor) -> Tensor:
        return ops.resample2d(x, numbers, up, down)

    def convolution(x: Tensor) -> Tensor:
        function = F.conv2d if down == 2 else F.conv_transpose2d
        return function(x, kernel, stride=2, padding=padding, groups=C)

    def twin(x: Tensor) -> Tensor:
        return ops.resample2d_reference(x, numbers, up, down)

    g = torch.ones_like(native(x))
    rounds = 15 if B * C * H * W > 2**22 else 60
    row = {
        "op": "resample2d", "size": size, "way": way, "layout": layout, "dtype": str(dtype)[6:], "pass": what,
        "taps": taps,
    }  # fmt: skip
    functions = {"native": native, "grouped convolution": convolution, "eager twin": twin}
    if what == "forward":
        callables = {name: lambda h=h: h(x.detach()) for name, h in functions.items()}
    else:
        callables = {name: lambda h=h: torch.autograd.grad(h(x), x, g) for name, h in functions.items()}
    moved = {"native": (x.nbytes + g.nbytes) * (1 if what == "forward" else 2), "grouped convolution": 0}
    compare("ops", callables, rounds, device, moved, **row)
