"""One training gradient of full-size networks within the memory of small cards: the plan's bytes, and a device's.

The networks have random weights. Without a CUDA device the predicted bytes are the figure, marked so; with one, the
allocator is capped at the card's size and the gradient is held against one in float32 without a cap.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from gas_engine import Denoiser, GeneralizedSolver, guided
from gas_engine.architectures import Architecture, architecture
from gas_engine.execution import Execution, Weights
from gas_engine.gradients import loss_backward
from gas_engine.planner import Plan, plan

STEPS, BATCH = 6, 1
GIB = 2**30
CARDS: list[tuple[str, int, Weights]] = [
    ("sd15", 3, "resident"), ("sdxl", 6, "resident"), ("flux", 14, "int8"), ("flux", 10, "streamed"),
]  # fmt: skip


def model(entry: Architecture, small: bool, device: str, dtype: torch.dtype) -> tuple[Denoiser, Any]:
    """The network, which computes in its own dtype and returns it, and a condition."""
    with torch.device(device):
        denoiser = entry.denoiser(small).to(dtype)
        cond, null = entry.cond(BATCH, small), entry.null_cond(1, small)
    cond, null = (tree_map(lambda c: _to(c, dtype), v) for v in (cond, null))
    return guided(denoiser, 5.0, null) if entry.guided else denoiser, cond


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def gradient(denoiser: Denoiser, execution: Execution, x: Tensor, cond: Any) -> tuple[Tensor, float]:
    """The gradient of a solver's parameters, and seconds; states are float32, the network has its own precision."""
    solver = GeneralizedSolver(STEPS, denoiser.schedule, start="quadratic")
    view, begun = execution.view(denoiser), time.perf_counter()
    loss_backward(
        view, x, solver.tableau(denoiser.prediction), lambda y, rows: y.abs().flatten(1).mean(1), cond,
        execution.memory, execution.micro_batch,
    )  # fmt: skip
    if x.is_cuda:
        torch.cuda.synchronize()
    return torch.cat([p.grad.flatten() for p in solver.parameters() if p.grad is not None]), time.perf_counter() - begun


def predicted(entry: Architecture, small: bool, dtype: torch.dtype, gib: int, weights: Weights) -> Plan:
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = entry.denoiser(small)
    cond = entry.cond(1, small)
    if entry.guided:
        denoiser = guided(denoiser, 5.0, entry.null_cond(1, small))
    # A capped allocator counts its own rounding and the libraries' workspaces too.
    return plan(denoiser, STEPS, BATCH, int(gib * GIB / 1.03), cond=cond, dtype=dtype, weights=(weights,)).choice


@pytest.mark.parametrize(("name", "gib", "weights"), CARDS, ids=lambda v: str(v))
def bench_card(
    bench_record: Callable[..., None], benchmark: Any, smoke: bool, name: str, gib: int, weights: Weights
) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    if weights == "int8" and (smoke or torch.cuda.is_available()):
        pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    entry, dtype = architecture(name), torch.bfloat16
    chosen = predicted(entry, smoke, dtype, gib, weights)
    row = {
        "name": entry.title, "card_gib": gib, "weights": weights, "dtype": "bfloat16", "steps": STEPS, "batch": BATCH,
        "guided": entry.guided, "plan": str(chosen.execution), "predicted_gib": round(chosen.bytes / GIB, 3),
    }  # fmt: skip
    assert chosen.bytes <= gib * GIB / 1.03
    benchmark.pedantic(lambda: None, rounds=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not smoke:
        bench_record("cards", "cpu", **row, measured="no device: predicted")
        return
    denoiser, cond = model(entry, smoke, device, dtype)
    x = torch.randn(BATCH, *denoiser.shape, device=device)  # type: ignore[misc]
    placed = chosen.execution.place(denoiser.to("cpu") if weights == "streamed" else denoiser, device)
    del denoiser
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
        torch.cuda.reset_peak_memory_stats()
    try:
        gradient(placed, chosen.execution, x, cond)
        got, seconds = gradient(placed, chosen.execution, x, cond)
        peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else 0.0
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    error: float | str = ""
    if weights == "resident":
        exact, cond = placed.base.float(), tree_map(lambda c: _to(c, torch.float32), cond)
        reference = guided(exact, 5.0, tree_map(lambda c: _to(c, torch.float32).to(device), entry.null_cond(1, smoke)))
        wanted, _ = gradient(reference, Execution(), x, cond)
        error = float(f"{float((got - wanted).norm() / wanted.norm()):.2g}")
    bench_record(
        "cards", device, **row, measured_gib=round(peak, 3), seconds=round(seconds, 3), gradient_error=error
    )  # fmt: skip
