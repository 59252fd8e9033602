"""What the fused ops buy: time against the eager twin and against copying the same states once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gas_engine import ops
from gas_engine.ops import _samples

J = 10
# Ten states of 16 MiB: memory-bound. A CIFAR-10 batch of 24: in cache, where calls and launches show.
SHAPES = {"16MiB": (4, 2**20), "24x3x32x32": (24, 3, 32, 32)}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run bench/gpu.sh on one"),
        ],
    ),
]


def copies(states: list[Tensor]) -> Callable[[], None]:
    """Copy every state once: 2J moves, the yardstick of what the memory gives."""
    targets = [torch.empty_like(s) for s in states]

    def run() -> None:
        for target, state in zip(targets, states, strict=True):
            target.copy_(state)

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SHAPES)
def bench_lincomb(compare: Callable[..., None], smoke: bool, size: str, dtype: torch.dtype, device: str) -> None:
    shape = (3, 43) if smoke else SHAPES[size]
    states, coef = _samples.lincomb_inputs(shape, J, dtype, device)
    scale = coef[:1]
    callables = {
        "native": lambda: ops.lincomb(states, coef),
        "native + cast": lambda: ops.lincomb(states, coef, scale, torch.bfloat16),
        "eager twin": lambda: ops.lincomb_reference(states, coef),
        "copies": copies(states),
    }
    rounds = 15 if size == "16MiB" else 200
    compare("ops", callables, rounds, device, op="lincomb", J=J, size=size, dtype=str(dtype)[6:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SHAPES)
def bench_adjoint_step(compare: Callable[..., None], smoke: bool, size: str, dtype: torch.dtype, device: str) -> None:
    x, f, g, a, b = _samples.adjoint_step_inputs((3, 43) if smoke else SHAPES[size], J, dtype, device)
    callables = {
        "native": lambda: ops.adjoint_step(x, f, g, a, b),
        "eager twin": lambda: ops.adjoint_step_reference(x, f, g, a, b),
        "copies": copies([x, f, *g]),
    }
    rounds = 15 if size == "16MiB" else 200
    compare("ops", callables, rounds, device, op="adjoint_step", J=J, size=size, dtype=str(dtype)[6:])
