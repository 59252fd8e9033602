"""What the fused ops buy: time against the eager twin and against copying the same states once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import DEVICES, sizes_on_devices
from torch import Tensor

from gas_engine import ops
from gas_engine.ops import _samples

J = 10
# Ten states of 16 MiB: memory-bound. A CIFAR-10 batch of 24: in cache, where calls and launches show.
CASES = sizes_on_devices(["16MiB", "24x3x32x32"], ["128MiB"])


def shape_of(size: str, dtype: torch.dtype = torch.float32, smoke: bool = False) -> tuple[int, ...]:
    """The state that fills so many bytes, or has so many numbers."""
    if smoke:
        return (3, 43)
    if size.endswith("MiB"):
        return (int(size[:-3]), 2**20 // dtype.itemsize)
    return tuple(map(int, size.split("x")))


def copies(states: list[Tensor]) -> Callable[[], None]:
    """Copy the states, one after the other, into one buffer: the yardstick of what the memory gives."""
    buffer = torch.empty_like(states[0])

    def run() -> None:
        for state in states:
            buffer.copy_(state)

    return run


def rounds_for(size: str) -> int:
    return 200 if size == "24x3x32x32" else 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "device"), CASES)
def bench_lincomb(compare: Callable[..., None], smoke: bool, size: str, dtype: torch.dtype, device: str) -> None:
    states, coef = _samples.lincomb_inputs(shape_of(size, dtype, smoke), J, dtype, device)
    scale = coef[:1]
    callables = {
        "native": lambda: ops.lincomb(states, coef),
        "native + cast": lambda: ops.lincomb(states, coef, scale, torch.bfloat16),
        "eager twin": lambda: ops.lincomb_reference(states, coef),
        "copies": copies(states),
    }
    state = states[0].nbytes
    moved = {
        "native": (J + 1) * state,
        "native + cast": (J + 1) * state + states[0].numel() * 2,
        "copies": 2 * J * state,
    }
    compare("ops", callables, rounds_for(size), device, moved, op="lincomb", J=J, size=size, dtype=str(dtype)[6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "device"), CASES)
def bench_adjoint_step(compare: Callable[..., None], smoke: bool, size: str, dtype: torch.dtype, device: str) -> None:
    x, f, g, a, b = _samples.adjoint_step_inputs(shape_of(size, dtype, smoke), J, dtype, device)
    y = x.clone()
    callables = {
        "native": lambda: ops.adjoint_step(x, f, g, a, b),
        "native, in place": lambda: ops.adjoint_step_(y, f, g, a, b),
        "eager twin": lambda: ops.adjoint_step_reference(x, f, g, a, b),
        "copies": copies(g),
    }
    moved = dict.fromkeys(("native", "native, in place"), (J + 4) * x.nbytes) | {"copies": 2 * J * x.nbytes}
    compare("ops", callables, rounds_for(size), device, moved, op="adjoint_step", J=J, size=size, dtype=str(dtype)[6:])


def bench_call_overhead(compare: Callable[..., None]) -> None:
    """States of one element: what a call costs before any work."""
    states, coef = _samples.lincomb_inputs((1,), J)
    x, f, g, a, b = _samples.adjoint_step_inputs((1,), J)
    callables = {
        "lincomb": lambda: ops.lincomb(states, coef),
        "adjoint_step": lambda: ops.adjoint_step(x, f, g, a, b),
        "one torch.add": lambda: torch.add(x, f),
    }
    compare("ops", callables, 3000, op="call overhead", J=J, size="1", dtype="float32")


@pytest.mark.parametrize(("size", "device"), CASES)
def bench_guidance(compare: Callable[..., None], smoke: bool, size: str, device: str) -> None:
    """Guidance is a lincomb of two: it moves the three arrays that a kernel of its own would move."""
    (uncond, cond), _ = _samples.lincomb_inputs(shape_of(size, smoke=smoke), 2, device=device)
    coef = torch.tensor([-6.5, 7.5], dtype=torch.float64, device=device)
    callables = {
        "lincomb": lambda: ops.lincomb([uncond, cond], coef),
        "eager": lambda: uncond + 7.5 * (cond - uncond),
        "torch.lerp": lambda: torch.lerp(uncond, cond, 7.5),
        "torch.add": lambda: torch.add(uncond, cond),  # the same three moves, by PyTorch
    }
    moved = dict.fromkeys(callables, 3 * cond.nbytes)
    compare("ops", callables, rounds_for(size), device, moved, op="guidance", J=2, size=size, dtype="float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "device"), CASES)
def bench_reversible(compare: Callable[..., None], smoke: bool, size: str, dtype: torch.dtype, device: str) -> None:
    (x_prev, x, f), _ = _samples.lincomb_inputs(shape_of(size, dtype, smoke), 3, dtype, device)
    coef = torch.tensor([0.9, 0.05, 0.1], dtype=torch.float64, device=device)
    x_next, codes = ops.reversible_step(x_prev, x, f, coef)
    callables = {
        "step with codes": lambda: ops.reversible_step(x_prev, x, f, coef),
        "step, escapes not listed": lambda: torch.ops.gas_engine.reversible_step(x_prev, x, f, coef),
        "inverse": lambda: ops.reversible_inverse(x_next, x, f, coef, codes),
        "step without (lincomb)": lambda: ops.lincomb([x_prev, x, f], coef),
        "eager twin of the step": lambda: ops.reversible_step_reference(x_prev, x, f, coef),
        "copies": copies([x_prev, x, f]),
    }
    bytes = 4 * x.nbytes + x.numel()  # a code is a byte
    moved = {"step, escapes not listed": bytes, "step without (lincomb)": 4 * x.nbytes}
    row = {"op": "reversible_step", "J": 3, "size": size, "dtype": str(dtype)[6:]}
    compare("ops", callables, rounds_for(size), device, moved, **row)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_conv_frozen(compare: Callable[..., None], smoke: bool, dtype: torch.dtype, device: str) -> None:
    """Forward and backward with frozen weights, and the bytes each keeps."""
    shape = (1, 4, 5, 5) if smoke else (8, 128, 32, 32)
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    weight = torch.randn(shape[1], shape[1], 3, 3).to(device, dtype)

    def both(convolve: Callable[..., Tensor]) -> Callable[[], None]:
        return lambda: convolve(x, weight, padding=1).sum().backward()

    callables = {"conv_frozen": both(ops.conv_frozen), "torch conv2d": both(torch.nn.functional.conv2d)}
    compare("ops", callables, 15, device, op="conv_frozen", J="", size=str(list(shape)), dtype=str(dtype)[6:])
