"""One training update of full-size networks within the memory of small cards: the plan's bytes, and a device's.

A GS update is the solver's gradient; a GAS update also steps a discriminator of latents, its moments included. Networks
have random bfloat16 weights. Without a CUDA device the predicted bytes are the figure, marked so; with one, the
allocator is capped at the card's size, and the gradient is held against one in float32 without a cap.
"""

from __future__ import annotations

import functools
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, guided
from gas_engine.architectures import Architecture, architecture
from gas_engine.costs import Probe
from gas_engine.execution import Execution, Weights
from gas_engine.gradients import loss_backward
from gas_engine.losses import distillation_loss
from gas_engine.networks import R3GANDiscriminator, discriminator_for
from gas_engine.planner import LIBRARIES, plan
from gas_engine.training.adversary import Adversarial, Adversary
from gas_engine.training.recipe import Recipe
from gas_engine.training.trainer import Trainer

BATCH, GIB = 1, 2**30
STEPS = {"flux": 4}  # else 6: a call of FLUX takes a third of a second
ROOM = 96 * 2**20  # what a capped allocator counts besides: the pieces that it cannot use
CARDS: list[tuple[str, int, Weights]] = [
    ("sd15", 3, "resident"), ("sdxl", 6, "resident"),
    ("flux", 10, "nf4"), ("flux", 10, "streamed"), ("flux", 14, "int8"),
]  # fmt: skip
CUDA = torch.cuda.is_available()
COMPARED = {"flux": 2}  # evaluations of the gradient that is held against float32, where a call takes seconds


def steps_of(name: str) -> int:
    return STEPS.get(name, 6)


def model(entry: Architecture, small: bool, device: str) -> tuple[Denoiser, Any]:
    """The network in bfloat16, always the same, and a condition."""
    torch.manual_seed(0)
    # Never there in float32, whose memory would be given back in pieces.
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            denoiser = entry.denoiser(small)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device(device):
        cond, null = entry.cond(BATCH, small), entry.null_cond(1, small)
    cond, null = (tree_map(lambda c: _to(c, torch.bfloat16), v) for v in (cond, null))
    denoiser = denoiser.to(torch.bfloat16)
    return guided(denoiser, 5.0, null) if entry.guided else denoiser, cond


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def discriminator(shape: tuple[int, ...], small: bool) -> R3GANDiscriminator:
    return R3GANDiscriminator([16] * 3, [4] * 3, [1] * 3, channels=shape[0]) if small else discriminator_for(shape)


@functools.lru_cache(1)
def probed(name: str, small: bool) -> tuple[Denoiser, Probe]:
    """The network in fake tensors, measured once for all that is planned with it."""
    entry = architecture(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = entry.denoiser(small)
    cond = entry.cond(1, small)
    probe = Probe(denoiser, cond, torch.bfloat16)
    return guided(denoiser, 5.0, entry.null_cond(1, small)) if entry.guided else denoiser, probe


Row = dict[str, Any]
Predicted = tuple[int, Execution]


def predicted(name: str, small: bool, gib: int, weights: Weights, adversary: Adversary | None) -> Predicted:
    """Bytes and execution of the fastest way within a card. Raises ValueError if there is none."""
    denoiser, probe = probed(name, small)
    assert denoiser.shape is not None
    beside = functools.partial(adversary.fitted, denoiser.shape, BATCH, steps_of(name)) if adversary else None
    choice = plan(
        denoiser, steps_of(name), BATCH, gib * GIB - ROOM, cond=probe.cond, weights=(weights,),
        blocks=("auto", "nested"), probe=probe, beside=beside, libraries=LIBRARIES,
    ).choice  # fmt: skip
    return choice.bytes, choice.execution


def known(plans: Path | None, key: str, make: Callable[[], Predicted]) -> Predicted:
    """What the file of plans says, so that a device need not wait for a host that plans; it is added where missing."""
    said = json.loads(plans.read_text()) if plans is not None and plans.exists() else {}
    if key not in said:
        size, execution = make()
        said[key] = [size, asdict(execution)]
        if plans is not None:
            plans.write_text(json.dumps(said, indent=1))
    size, fields = said[key]
    return size, Execution(**fields | {"memory": MemoryPolicy(**fields["memory"])})


@contextmanager
def capped(gib: int) -> Iterator[None]:
    """The allocator gives out no more than this."""
    gc.collect()
    if not CUDA:
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def updates(trainer: Trainer, warm: bool) -> tuple[float, float]:
    """Seconds of an update, if `warm` the second one, and GiB at most given out, all that the device holds included."""
    if warm:
        trainer.update()
    begun = time.perf_counter()
    trainer.update()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, torch.cuda.max_memory_allocated() / GIB if CUDA else 0.0


def gradient(denoiser: Denoiser, execution: Execution, x: Tensor, cond: Any, steps: int) -> Tensor:
    """The gradient of a solver's parameters; states are float32, the network has its own precision."""
    solver = GeneralizedSolver(steps, denoiser.schedule, start="quadratic")
    loss_backward(
        execution.view(denoiser), x, solver.tableau(denoiser.prediction), lambda y, rows: y.abs().flatten(1).mean(1),
        cond, execution.memory, execution.micro_batch,
    )  # fmt: skip
    return torch.cat([p.grad.flatten() for p in solver.parameters() if p.grad is not None])


@functools.lru_cache(1)
def exact_gradient(name: str, small: bool, device: str) -> Tensor:
    """The same gradient of the same weights in float32 arithmetic, without a cap or TF32."""
    entry = architecture(name)
    denoiser, cond = model(entry, small, device)
    wide, cond = denoiser.base.float(), tree_map(lambda c: _to(c, torch.float32), cond)
    if entry.guided:
        wide = guided(wide, 5.0, tree_map(lambda c: _to(c, torch.float32).to(device), entry.null_cond(1, small)))
    x = noise(entry, small, device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        way = Execution(MemoryPolicy(1), lean=True, blocks="auto")
        return gradient(wide, way, x, cond, COMPARED.get(name, steps_of(name)))


def noise(entry: Architecture, small: bool, device: str) -> Tensor:
    shape = entry.small_shape if small else entry.shape
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0)).to(device)


def measured(
    entry: Architecture, small: bool, ways: dict[str, Execution], weights: Weights, gib: int
) -> dict[str, Row]:
    """Of a GS and a GAS update: GiB and seconds, or what went wrong; of the gradient: its error."""
    name, device = entry.name, "cuda" if CUDA else "cpu"
    wanted = exact_gradient(name, small, device)
    denoiser, cond = model(entry, small, device)
    first = next(iter(ways.values()))
    placed = first.place(denoiser.to("cpu") if weights == "streamed" else denoiser, device)
    del denoiser
    x, stored = noise(entry, small, device), (noise(entry, small, "cpu"), tree_map(_cpu, cond))
    rows: dict[str, Row] = {}
    for kind, execution in ways.items():
        settings = Adversarial(micro_batch=1)
        adversary = None if kind == "GS" else Adversary(discriminator(x.shape[1:], small), settings, device)
        solver = GeneralizedSolver(steps_of(name), placed.schedule, start="quadratic")
        trainer = Trainer(
            placed, solver, [0], torch.zeros(1, *x.shape[1:]), distillation_loss("l1"),
            Recipe(3, BATCH, 1e-4, "constant", ema=0.99, start_grid=""), execution, device=torch.device(device),
            adversary=adversary, stored=stored,
        )  # fmt: skip
        with capped(gib):
            seconds, peak = updates(trainer, warm=name not in STEPS)
        rows[kind] = {"measured_gib": round(peak, 3), "seconds": round(seconds, 3), "notes": "; ".join(trainer.notices)}
        del trainer, adversary
    with capped(gib):
        got = gradient(placed, first, x, cond, COMPARED.get(name, steps_of(name)))
    rows["GS"]["gradient_error"] = float(f"{float((got - wanted).norm() / wanted.norm()):.2g}")
    return rows


@pytest.mark.parametrize(("name", "gib", "weights"), CARDS, ids=lambda v: str(v))
def bench_card(
    request: pytest.FixtureRequest, bench_record: Callable[..., None], benchmark: Any, smoke: bool, name: str, gib: int,
    weights: Weights,
) -> None:  # fmt: skip
    pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    if weights == "int8" and (smoke or CUDA):
        pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    entry, plans = architecture(name), request.config.getoption("--plans")
    benchmark.pedantic(lambda: None, rounds=1)
    shape = entry.small_shape if smoke else entry.shape
    networks = {"GS": None, "GAS": Adversary(discriminator(shape, smoke), Adversarial())}
    chosen = {
        kind: known(
            Path(plans) if plans and not smoke else None, f"{name} {gib} {weights} {kind}",
            functools.partial(predicted, name, smoke, gib, weights, adversary),
        )
        for kind, adversary in networks.items()
    }  # fmt: skip
    rows: dict[str, Row] = {kind: {"measured_gib": "no device: predicted"} for kind in chosen}
    failure = ""
    if CUDA or smoke:
        try:
            rows = measured(entry, smoke, {kind: execution for kind, (_, execution) in chosen.items()}, weights, gib)
        except Exception as error:  # told below, when nothing of it is held any more
            failure = traceback.format_exc()
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            rows = {kind: {"measured_gib": "", "notes": said} for kind in chosen}
    for kind, (size, execution) in chosen.items():
        bench_record(
            "cards", "cuda" if CUDA else "cpu", name=entry.title, kind=kind, card_gib=gib, weights=weights,
            dtype="bfloat16", steps=steps_of(name), batch=BATCH, guided=entry.guided, plan=str(execution),
            predicted_gib=round(size / GIB, 3), **rows[kind],
        )  # fmt: skip
    assert not failure, failure


def _cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf
