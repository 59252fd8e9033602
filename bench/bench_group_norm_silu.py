"""What `group_norm_silu` buys: forward and backward against stock PyTorch, plain and modulated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from devices import sizes_on_devices
from torch import Tensor

from gas_engine import ops

GROUPS = 32
SHAPES = {"24x128x32x32": (24, 128, 32, 32), "8x256x16x16": (8, 256, 16, 16), "4x128x64x64": (4, 128, 64, 64)}
SHAPES |= {"32x320x64x64": (32, 320, 64, 64)}
CASES = sizes_on_devices([*SHAPES][:3], [*SHAPES][3:])


def step(function: Callable[..., Tensor], g: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(*inputs), inputs, g)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["plain", "adaptive"])
@pytest.mark.parametrize(("size", "device"), CASES)
def bench_group_norm_silu(
    compare: Callable[..., None],
    smoke: bool,
    size: str,
    form: str,
    dtype: torch.dtype,
    layout: str,
    device: str,
) -> None:
    shape = (2, GROUPS, 3, 3) if smoke else SHAPES[size]
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    fmt = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    x, g = (new(*shape).contiguous(memory_format=fmt) for _ in range(2))
    weight, bias = new(shape[1]), new(shape[1])
    inputs = [x] if form == "plain" else [x, *(new(*shape[:2], 1, 1) for _ in range(2))]
    for t in inputs:
        t.requires_grad_()

    def native(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(x, GROUPS, weight, bias, scale=scale, shift=shift)

    def stock(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        y = F.group_norm(x, GROUPS, weight, bias)
        return F.silu(y if scale is None else torch.addcmul(shift, y, scale + 1))

    compare(
        "ops",
        {"native": step(native, g, inputs), "stock PyTorch": step(stock, g, inputs)},
        30,
        device,
        {"native": 5 * x.nbytes, "stock PyTorch": 0},  # x, y; x, g, dx
        op="group_norm_silu",
        size=size,
        form=form,
        layout=layout,
        dtype=str(dtype)[6:],
    )
