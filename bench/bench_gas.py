"""A whole GS or GAS iteration on a GPU, against the loop that one writes first.

The plain loop: float32 (convolutions in TF32, as PyTorch has them), stock layers, every state and every network graph
kept, autograd through all of it; the discriminator's penalties by one joint double backward. Both sides train the same
solver of the CIFAR-10 EDM network (random weights) with the same discriminator, optimisers included. Peak bytes are
above weights and optimisers.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from bench_memory import stock_edm
from torch import Tensor

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, Tableau, rollout
from gas_engine.architectures import architecture
from gas_engine.execution import Execution
from gas_engine.gradients import loss_backward
from gas_engine.losses.adversarial import discriminator_loss, generator_loss
from gas_engine.memory import ByteTracker
from gas_engine.networks import _r3gan_layers
from gas_engine.networks.r3gan import R3GANDiscriminator, discriminator_for

GAMMA, WEIGHT, GIB = 0.2, 0.1, 2**30
CUDA = torch.cuda.is_available()


@contextmanager
def stock() -> Iterator[None]:
    """Both networks on PyTorch's own layers."""

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        return F.conv2d(x, weight, bias, **options)

    def activation(x: Tensor, bias: Tensor, slope: float) -> Tensor:
        return F.leaky_relu(x + bias[:, None, None], slope)

    def halve(x: Tensor, taps: list[float]) -> Tensor:
        filter_ = torch.tensor(taps, dtype=x.dtype, device=x.device) / sum(taps)
        weight = torch.outer(filter_, filter_).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, weight, stride=2, padding=(len(taps) - 1) // 2, groups=x.shape[1])

    with (
        stock_edm(),
        mock.patch.multiple(_r3gan_layers, conv_frozen=conv, bias_leaky_relu=activation, resample2d=halve),
    ):
        yield


class Iteration:
    """What both sides have in common: noise, targets, the student, the discriminator, their optimisers."""

    def __init__(self, denoiser: Denoiser, D: R3GANDiscriminator | None, steps: int, batch: int) -> None:
        assert denoiser.shape is not None
        self.denoiser, self.D, self.batch = denoiser, D, batch
        self.device = next(denoiser.parameters()).device
        torch.manual_seed(0)
        self.x, self.fresh, self.targets = torch.randn(3, batch, *denoiser.shape).to(self.device).unbind()
        self.solver = GeneralizedSolver(steps, denoiser.schedule, start="quadratic")
        self.optimizer = torch.optim.Adam(self.solver.parameters(), 1e-5)
        self.d_optimizer = torch.optim.Adam(D.parameters(), 1e-5) if D is not None else None

    def tableau(self) -> Tableau:
        return self.solver.tableau(self.denoiser.prediction)

    def __call__(self) -> None:
        if self.D is not None and self.d_optimizer is not None:
            self.d_optimizer.zero_grad()
            with torch.no_grad():
                fake = self.sample(self.fresh, self.tableau())
            self.discriminator_step(self.D, fake)
            self.d_optimizer.step()
        self.optimizer.zero_grad()
        self.student_step()
        self.optimizer.step()

    def sample(self, x: Tensor, tableau: Tableau) -> Tensor:
        raise NotImplementedError

    def discriminator_step(self, D: R3GANDiscriminator, fake: Tensor) -> None:
        raise NotImplementedError

    def student_step(self) -> None:
        raise NotImplementedError


class Plain(Iteration):
    def __call__(self) -> None:
        with stock():
            super().__call__()

    def sample(self, x: Tensor, tableau: Tableau) -> Tensor:
        A, B, told = (v.to(x.device) for v in (tableau.A, tableau.B, tableau.t_net))
        states, outputs = [x], []
        for n in range(tableau.steps):
            outputs.append(self.denoiser(states[n], told[n], None))
            new = torch.zeros_like(x)
            for j in range(n + 1):
                new = new + A[n, j].to(x.dtype) * states[j] + B[n, j].to(x.dtype) * outputs[j]
            states.append(new)
        return states[-1]

    def discriminator_step(self, D: R3GANDiscriminator, fake: Tensor) -> None:
        both = torch.cat([self.targets, fake]).requires_grad_()
        logits = D(both)
        (slopes,) = torch.autograd.grad(logits.sum(), both, create_graph=True)
        real, fake = logits.chunk(2)
        penalty = slopes.square().flatten(1).sum(1).view(2, -1).sum(0)
        (F.softplus(fake - real) + GAMMA / 2 * penalty).mean().backward()

    def student_step(self) -> None:
        y = self.sample(self.x, self.tableau())
        loss = (y - self.targets).abs().flatten(1).mean(1)
        if self.D is not None:
            self.D.requires_grad_(False)
            loss = loss + WEIGHT * F.softplus(self.D(self.targets) - self.D(y))
        loss.mean().backward()
        if self.D is not None:
            self.D.requires_grad_(True)


class Engine(Iteration):
    def __init__(
        self, denoiser: Denoiser, D: R3GANDiscriminator | None, steps: int, batch: int, execution: Execution
    ) -> None:
        placed = execution.place(denoiser, next(denoiser.parameters()).device)
        super().__init__(placed, D, steps, batch)
        self.view, self.execution = execution.view(placed), execution

    def sample(self, x: Tensor, tableau: Tableau) -> Tensor:
        return rollout(self.view, x, tableau, memory=self.execution.memory)

    def discriminator_step(self, D: R3GANDiscriminator, fake: Tensor) -> None:
        discriminator_loss(D, self.targets, fake, gamma=GAMMA, micro_batch=self.execution.micro_batch)

    def student_step(self) -> None:
        real = None
        if self.D is not None:
            with torch.no_grad():
                real = self.D(self.targets)

        def loss(y: Tensor, rows: slice) -> Tensor:
            distance = (y - self.targets[rows]).abs().flatten(1).mean(1)
            return distance if real is None else distance + WEIGHT * generator_loss(self.D, y, real[rows])

        loss_backward(self.view, self.x, self.tableau(), loss, None, self.execution.memory, self.execution.micro_batch)


def peak_bytes(run: Callable[[], None]) -> int:
    """At most alive in a run, above what was there before: by CUDA's own count, since a tracker, which sees every
    operation, would keep the compiler away."""
    if not CUDA:
        with ByteTracker() as bytes:
            run()
        return bytes.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def held_by_graphs() -> int:
    """Bytes that nobody but a captured graph can use."""
    if not CUDA:
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def where(run: Callable[[], None]) -> str:
    """The operations that take most of the time, with their shares, and how long the device waits for the host."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if CUDA else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        if CUDA:
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:
            times[event.key.removeprefix("aten::")] += (
                event.self_device_time_total if CUDA else event.self_cpu_time_total
            )
    total = sum(times.values()) or 1
    shares = [f"{name} {100 * spent / total:.0f} %" for name, spent in times.most_common(6)]
    return ", ".join([*shares, f"{total / 1e3:.1f} ms on the {'device' if CUDA else 'host'}"])


def ways(kind: str, steps: int, smoke: bool) -> dict[str, Callable[[], Iteration]]:
    batch, device = 2 if smoke else 24, "cuda" if CUDA else "cpu"

    def networks() -> tuple[Denoiser, R3GANDiscriminator | None]:
        torch.manual_seed(0)
        denoiser = architecture("cifar10").denoiser(small=smoke).to(device)
        if kind == "GS" or denoiser.shape is None:
            return denoiser, None
        size = denoiser.shape[-1]
        widths = [8] * (size.bit_length() - 2)
        small = R3GANDiscriminator(widths, [2] * len(widths), [1] * len(widths)) if smoke else None
        return denoiser, (small or discriminator_for(denoiser.shape)).to(device)

    def engine(**options: Any) -> Callable[[], Iteration]:
        return lambda: Engine(*networks(), steps, batch, Execution(MemoryPolicy(1), **options))

    half: dict[str, Any] = {"precision": "bf16", "channels_last": True}
    found: dict[str, Callable[[], Iteration]] = {
        "plain float32, all kept": lambda: Plain(*networks(), steps, batch),
        "engine, fp32": engine(),
        "engine, bf16, channels last": engine(**half),
    }
    if CUDA:
        found["engine, bf16, channels last, graphs"] = engine(**half, cuda_graphs=True)
        found["engine, bf16, compiled"] = engine(**half, compile=True)
    return found


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("kind", ["GS", "GAS"])
def bench_iteration(
    compare: Callable[..., dict[str, float]], bench_record: Callable[..., None], smoke: bool, kind: str, steps: int
) -> None:
    """Seconds, peak bytes and where the time goes."""
    if not CUDA and not smoke:
        pytest.skip("full size needs a CUDA device: bench/gpu.sh; --smoke runs the code on the CPU")
    if smoke and steps > 4:
        pytest.skip("--smoke has run this code with fewer steps")
    steps, on = 2 if smoke else steps, "cuda" if CUDA else "cpu"
    made, rows = {}, []
    for name, make in ways(kind, steps, smoke).items():
        made[name], before = make(), held_by_graphs()
        made[name]()  # compiles, captures, chooses algorithms
        held = max(0, held_by_graphs() - before) if "graphs" in name else 0
        rows.append((name, held + peak_bytes(made[name]), where(made[name])))
    compare("gas", made, 15, on, what=f"{kind}, seconds", steps=steps)
    for name, peak, notes in rows:
        ratio = float(f"{rows[0][1] / peak:.3g}")
        bench_record(
            "gas", on, what=f"{kind}, peak GiB, plain / this", steps=steps, name=name,
            peak=float(f"{peak / GIB:.4g}"), ratio=ratio, notes=notes,
        )  # fmt: skip


def bench_gradients_agree(benchmark: Any, smoke: bool) -> None:
    """Both sides compute the same: the solver's gradient and the discriminator's, in float32."""
    if not CUDA and not smoke:
        pytest.skip("full size needs a CUDA device: bench/gpu.sh; --smoke runs the code on the CPU")
    found = ways("GAS", 2, smoke)
    grads = []
    for name in ("plain float32, all kept", "engine, fp32"):
        iteration = found[name]()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
            for p in iteration.denoiser.parameters():  # as built, its output is all but zero
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.device))
            with torch.enable_grad():
                iteration()
        assert iteration.D is not None
        grads.append([p.grad for p in (*iteration.D.parameters(), *iteration.solver.parameters())])
    benchmark.pedantic(lambda: None, rounds=1)
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a - b).norm()) <= 1e-2 * float(a.norm()) + 1e-12
