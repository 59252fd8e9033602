"""`adjoint_step_` writes over its state: the same numbers as the op that allocates, and autograd learns of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from marks import DEVICES, needs_core
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

from gas_engine import ops
from gas_engine.ops import _samples


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


# The kernel is called directly, or, where somebody watches, by the dispatcher.
WATCHERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nobody": contextlib.nullcontext,
    "a dispatch mode": Watcher,
    "the profiler": lambda: torch.profiler.profile(activities=[ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [*_samples.ODD_SIZES, 3_000_003])
def test_a_state_makes_room_for_its_cotangent(n: int, device: str) -> None:
    x, f, g, a, b = _samples.adjoint_step_inputs((n,), 4, device=device)
    mu, g_x, da, db = ops.adjoint_step(x, f, g, a, b)
    address = x.data_ptr()
    mu2, da2, db2 = ops.adjoint_step_(x, f, g, a, b)
    assert x.data_ptr() == address
    for got, want in zip((mu2, x, da2, db2), (mu, g_x, da, db), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bare", [False, pytest.param(True, marks=needs_core)])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_autograd_learns_that_the_state_changed(watcher: str, bare: bool, device: str) -> None:
    """What has kept the state for a backward pass must refuse to use what is there now."""
    x, f, g, a, b = _samples.adjoint_step_inputs((129,), 3, device=device)
    expected, version = ops.adjoint_step(x, f, g, a, b)[1], x._version
    weight = torch.ones_like(x, requires_grad=True)
    y = (weight * x).sum()
    with WATCHERS[watcher]():
        (torch.ops.gas_engine.adjoint_step_ if bare else ops.adjoint_step_)(x, f, g, a, b)
    assert torch.equal(x, expected) and x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("device", DEVICES)
@needs_core
def test_opcheck(device: str) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x, f, g, a, b = _samples.adjoint_step_inputs((2, 3, 4, 5), 3, device=device, layout=layout)
        for output in (f, f.bfloat16()):
            torch.library.opcheck(torch.ops.gas_engine.adjoint_step_.default, (x.clone(), output, g, a, b))


def test_compile_fullgraph() -> None:
    x, f, g, a, b = _samples.adjoint_step_inputs((4, 33), 3)
    mu, g_x, da, db = ops.adjoint_step(x, f, g, a, b)
    compiled = torch.compile(ops.adjoint_step_, backend="aot_eager", fullgraph=True)
    mu2, da2, db2 = compiled(x, f, g, a, b)
    for got, want in zip((mu2, x, da2, db2), (mu, g_x, da, db), strict=True):
        assert torch.equal(got, want)


def test_needs_a_dense_state() -> None:
    x, f, g, a, b = _samples.adjoint_step_inputs((4, 6), 2)
    with pytest.raises(ValueError, match=r"must be dense.*strides \(1, 4\)"):
        ops.adjoint_step_(x.reshape(6, 4).t(), f, g, a, b)


def test_refuses_an_overlap() -> None:
    memory = torch.randn(120)
    _, f, _, a, b = _samples.adjoint_step_inputs((100,), 1)
    with pytest.raises(ValueError, match="overlaps its memory"):
        ops.adjoint_step_(memory[:100], f, [memory[20:]], a, b)
    x = memory[:100].clone()
    mu, _, _, _ = ops.adjoint_step(x, f, [x], a, b)
    assert torch.equal(ops.adjoint_step_(x, f, [x], a, b)[0], mu)  # the very same memory is no harm
