"""What a training iteration holds and takes: stock PyTorch, lean, one graph, blocks, and the trajectories.

Bytes are exact, from fake tensors of the full-size networks; seconds are of the CIFAR-10 network, run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gas_engine import BELMSolver, Denoiser, GeneralizedSolver, MemoryPolicy
from gas_engine.architectures import architecture
from gas_engine.execution import Execution
from gas_engine.gradients import loss_backward
from gas_engine.memory import ByteTracker
from gas_engine.networks import _layers

MIB = 2**20


@contextmanager
def stock_edm() -> Iterator[None]:
    """The EDM networks on PyTorch's own layers, as they were published."""

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        return F.conv2d(x, weight, bias, **options)

    def norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *rest: Any) -> Tensor:
        scale, shift, act = (*rest, None, None, "none")[:3] if len(rest) < 3 else rest
        h = F.group_norm(x, groups, weight, bias, eps)
        h = h if scale is None else torch.addcmul(shift, h, scale + 1)
        return F.silu(h) if act == "silu" else h

    def conv_of_parts(parts: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        (x,) = parts
        return F.conv2d(x, weight, bias)

    block = _layers.UNetBlock.forward

    def forward(self: Any, x: Tensor, embedding: Tensor, encoded: Tensor | None = None) -> Tensor:
        return block(self, x if encoded is None else torch.cat([x, encoded], 1), embedding)

    with (
        mock.patch.multiple(_layers, conv_frozen=conv, conv_of_parts=conv_of_parts, group_norm_silu=norm),
        mock.patch.object(_layers.UNetBlock, "forward", forward),
    ):
        yield


def of_one_call(network: nn.Module, *inputs: Any, blocks: bool = False) -> float:
    """MiB that the graph of a call keeps, or with blocks the peak of the call and its way back."""
    with ByteTracker() as bytes:
        y = network(*inputs)
        kept = bytes.live - y.nbytes
        if blocks:
            torch.autograd.grad(y, inputs[:2], torch.ones_like(y))
    return (bytes.peak if blocks else kept) / MIB


CALLS: dict[str, tuple[float | None, ...]] = {
    "cifar10": (113.0, 42, 16), "ffhq64": (291.6, 100, None), "adm64": (692, 372, None), "sd15": (1476, 935, 370),
    "sd3": (None, None, None), "flux": (None, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def bench_bytes_of_a_call(bench_record: Callable[..., None], benchmark: Any, smoke: bool, name: str) -> None:
    """MiB an image and call, float32, against the goals; "published" is what stock layers were measured to keep."""
    published, goal, goal_blocks = CALLS[name]
    entry = architecture(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = entry.denoiser(small=smoke)
        x, cond = torch.randn(1, *denoiser.shape, requires_grad=True), entry.cond(1, small=smoke)
        t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        with stock_edm():
            stock = of_one_call(denoiser, x, t, cond)
        thin = of_one_call(Execution(lean=True).view(denoiser), x, t, cond)
        blocks, nested = (
            of_one_call(Execution(lean=True, blocks=kind).view(denoiser), x, t, cond, blocks=True)
            for kind in ("auto", "nested")
        )
    benchmark.pedantic(lambda: None, rounds=1)
    bench_record(
        "memory", name=name, what="MiB a call", stock=round(stock, 1), published=published or "", lean=round(thin, 1),
        goal=goal or "", blocks=round(blocks, 1), nested=round(nested, 1), goal_blocks=goal_blocks or "",
        ratio=float(f"{stock / thin:.3g}"),
    )  # fmt: skip


def peak_of_an_iteration(denoiser: Denoiser, solver: Any, execution: Execution) -> float:
    """MiB above weights; the network's tensors are fake, the solver's numbers real."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(1, *denoiser.shape)  # type: ignore[misc]
    tableau = solver.tableau(denoiser.prediction)
    with ByteTracker() as bytes:
        loss_backward(
            execution.view(denoiser), x, tableau, lambda y, rows: y.abs().flatten(1).mean(1), None, execution.memory
        )
    return bytes.peak / MIB


def bench_peak_of_an_iteration(bench_record: Callable[..., None], benchmark: Any, smoke: bool) -> None:
    """The CIFAR-10 network: against all stock graphs at K = 10, and K = 20 against K = 4."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = architecture("cifar10").denoiser(small=smoke)
    many, few = (3, 2) if smoke else (20, 4)
    ways = {
        "stock, all graphs": Execution(MemoryPolicy(0)),
        "lean, all graphs": Execution(MemoryPolicy(0), lean=True),
        "lean, one graph": Execution(lean=True),
        "lean, one graph, blocks": Execution(lean=True, blocks="auto"),
        "lean, one graph, nested": Execution(lean=True, blocks="nested"),
    }
    solver = GeneralizedSolver(2 if smoke else 10, denoiser.schedule)
    peaks = {}
    for way, execution in ways.items():
        if way.startswith("stock"):
            with stock_edm():
                peaks[way] = peak_of_an_iteration(denoiser, solver, execution)
        else:
            peaks[way] = peak_of_an_iteration(denoiser, solver, execution)
        ratio = float(f"{peaks['stock, all graphs'] / peaks[way]:.4g}")
        bench_record("memory", name=way, what="peak MiB, K = 10", peak=round(peaks[way], 2), ratio=ratio)
    at = {
        k: peak_of_an_iteration(denoiser, GeneralizedSolver(k, denoiser.schedule), Execution(lean=True))
        for k in (few, many)
    }
    state = torch.Size(denoiser.shape or ()).numel() * 4 / MIB
    benchmark.pedantic(lambda: None, rounds=1)
    bench_record(
        "memory", name="K = 20 less its states / K = 4", what="peak MiB", peak=round(at[many], 2),
        ratio=float(f"{(at[many] - (many - few) * state) / at[few]:.4g}"),
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def bench_seconds_of_an_iteration(compare: Callable[..., dict[str, float]], smoke: bool, device: str) -> None:
    """The CIFAR-10 network, K = 10: lean with all graphs, one graph, blocks, against stock layers with all graphs."""
    torch.manual_seed(0)
    denoiser = architecture("cifar10").denoiser(small=smoke).to(device)
    solver = GeneralizedSolver(2 if smoke else 10, denoiser.schedule)
    batch = 1 if smoke else 2 if device == "cpu" else 24
    x = torch.randn(batch, *denoiser.shape).to(device)  # type: ignore[misc]

    def way(execution: Execution, stock: bool = False) -> Callable[[], None]:
        view = execution.view(denoiser)

        def run() -> None:
            solver.zero_grad()
            loss_backward(view, x, solver.tableau(), lambda y, rows: y.abs().flatten(1).mean(1), None, execution.memory)

        def run_stock() -> None:
            with stock_edm():
                run()

        return run_stock if stock else run

    ways = {
        "stock, all graphs": way(Execution(MemoryPolicy(0)), stock=True),
        "lean, all graphs": way(Execution(MemoryPolicy(0), lean=True)),
        "lean, one graph": way(Execution(lean=True)),
        "lean, one graph, blocks": way(Execution(lean=True, blocks="auto")),
        "lean, one graph, nested": way(Execution(lean=True, blocks="nested")),
    }
    compare("memory", ways, 5, device, what="seconds, K = 10", batch=batch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [6, 20])
def bench_trajectories(compare: Callable[..., dict[str, float]], smoke: bool, steps: int, device: str) -> None:
    """What it takes to keep, offload or walk back the states, beside a network that costs nothing."""
    shape = (1, 4, 4) if smoke else (4, 256, 256)

    def network(x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return x * t.to(x.dtype)

    denoiser = Denoiser(network, architecture("cifar10").schedule, "data", shape)
    solver, x = BELMSolver(steps, denoiser.schedule, start="quadratic"), torch.randn(4, *shape).to(device)

    def way(memory: MemoryPolicy) -> Callable[[], Tensor]:
        return lambda: loss_backward(
            denoiser, x, solver.tableau(), lambda y, rows: y.abs().flatten(1).mean(1), None, memory
        )

    ways = {
        "keep": way(MemoryPolicy()),
        "offload": way(MemoryPolicy(trajectory="offload")),
        "reversible, codes": way(MemoryPolicy(trajectory="reversible")),
        "reversible, carry": way(MemoryPolicy(trajectory="reversible", carry=True)),
    }
    compare("memory", ways, 20, device, what=f"trajectory, K = {steps}")
