"""A whole GAS iteration of the CIFAR-10 EDM network in a few GiB: planned, run, counted; on any device.

The paper's code takes 35 GB for it (arXiv 2510.17699, appendix). The plain loop is ``bench_gas``'s; the graphs of the
whole batch need not fit, so its time is that of two samples, scaled.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_gas import Plain

from gas_engine import GeneralizedSolver
from gas_engine.architectures import architecture
from gas_engine.losses import distillation_loss
from gas_engine.memory import ByteTracker
from gas_engine.networks import R3GANDiscriminator, discriminator_for
from gas_engine.planner import plan
from gas_engine.training.adversary import Adversarial, Adversary
from gas_engine.training.recipe import Recipe
from gas_engine.training.trainer import Trainer

GIB = 2**30
STEPS, BATCH, BUDGET, PLAIN_BATCH = 10, 24, 4 * GIB, 2


def bench_gas_iteration_within_four_gib(bench_record: Callable[..., None], benchmark: Any, smoke: bool) -> None:
    """Peak, weights and moments included, against the budget and the plan; seconds against the plain loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps, batch, budget = (2, 4, GIB // 8) if smoke else (STEPS, BATCH, BUDGET)
    torch.manual_seed(0)
    denoiser = architecture("cifar10").denoiser(small=smoke).to(device)
    assert denoiser.shape is not None
    small = R3GANDiscriminator([16] * 3, [4] * 3, [1] * 3, channels=denoiser.shape[0])
    network = small if smoke else discriminator_for(denoiser.shape)
    adversary = Adversary(network, Adversarial(), device)
    solver = GeneralizedSolver(steps, denoiser.schedule, start="quadratic")
    beside = functools.partial(adversary.fitted, denoiser.shape, batch, steps)
    tableau = solver.tableau(denoiser.prediction)
    chosen = plan(denoiser, steps, batch, budget, beside=beside, tableau=tableau).choice
    targets = torch.rand(batch, *denoiser.shape) * 2 - 1
    trainer = Trainer(
        denoiser, solver, list(range(batch)), targets, distillation_loss("l1"),
        Recipe(2, batch, 1e-3, "constant", ema=0.99, start_grid=""), chosen.execution,
        device=torch.device(device), adversary=adversary,
    )  # fmt: skip
    held = [*denoiser.parameters(), *denoiser.buffers(), *network.parameters(), *network.buffers(), targets]
    begun = time.perf_counter()
    with ByteTracker() as bytes:
        trainer.update()  # makes the moments too
    if device == "cuda":  # the first one chose algorithms
        torch.cuda.synchronize()
        begun = time.perf_counter()
        trainer.update()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    peak = bytes.peak + sum(t.nbytes for t in held)
    assert peak <= budget, f"{peak} bytes of {budget}"
    few = batch if device == "cuda" else min(batch, PLAIN_BATCH)  # 27 GB, which fit there
    plain = Plain(denoiser, network.requires_grad_(True), steps, few)
    if device == "cuda":
        plain()
        torch.cuda.synchronize()
    begun = time.perf_counter()
    plain()
    if device == "cuda":
        torch.cuda.synchronize()
    scaled = (time.perf_counter() - begun) * batch / few
    benchmark.pedantic(lambda: None, rounds=1)
    bench_record(
        "budget", device, name=f"GAS, CIFAR-10, K = {steps}, batch {batch}", execution=str(chosen.execution),
        budget_gib=budget / GIB, planned_gib=round(chosen.bytes / GIB, 3), peak_gib=round(peak / GIB, 3),
        seconds=round(seconds, 1), plain_seconds=round(scaled, 1), ratio=float(f"{scaled / seconds:.3g}"),
        notes="plain: all graphs, stock layers, joint double backward"
        + ("" if few == batch else f"; extrapolated from batch {few}"),
    )  # fmt: skip
