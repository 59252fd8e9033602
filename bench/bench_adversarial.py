"""The adversarial step of the default discriminator (22.4 M parameters), 3 x 64 x 64, batch 8.

Seconds of a discriminator step (loss, penalties, Adam) and of a generator step, run; bytes above weights and optimiser,
exact, from fake tensors. The first of each is what was published: PyTorch's own layers, real and fake in one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gas_engine.losses import discriminator_loss, generator_loss
from gas_engine.memory import ByteTracker
from gas_engine.networks import R3GANDiscriminator, _r3gan_layers

MIB = 2**20
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@contextmanager
def stock() -> Iterator[None]:
    """The discriminator on PyTorch's own layers."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(taps, taps)

    def activation(x: Tensor, bias: Tensor, slope: float) -> Tensor:
        return F.leaky_relu(x + bias[:, None, None], slope)

    def down(x: Tensor, _: Any) -> Tensor:
        return F.conv2d(x, kernel.to(x).expand(x.shape[1], 1, 4, 4), stride=2, padding=1, groups=x.shape[1])

    with mock.patch.multiple(_r3gan_layers, bias_leaky_relu=activation, resample2d=down, conv_frozen=F.conv2d):
        yield


def joint(D: R3GANDiscriminator, real: Tensor, fake: Tensor, gamma: float = 0.2) -> None:
    """Double backward, both sides in one graph."""
    with stock():
        sides = [x.detach().requires_grad_() for x in (real, fake)]
        a, b = map(D, sides)
        loss = F.softplus(b - a)
        for x, logits in zip(sides, (a, b), strict=True):
            loss = loss + gamma / 2 * torch.autograd.grad(logits.sum(), x, create_graph=True)[0].square().sum((1, 2, 3))
        loss.mean().backward()


def published_generator(D: R3GANDiscriminator, real: Tensor, fake: Tensor) -> None:
    with stock():
        F.softplus(D(real) - D(fake.detach().requires_grad_())).mean().backward()


def lean_generator(D: R3GANDiscriminator, real: Tensor, fake: Tensor) -> None:
    generator_loss(D, fake.detach().requires_grad_(), real).mean().backward()


def by(**options: Any) -> Callable[..., Any]:
    return lambda *args: discriminator_loss(*args, **options)


STEPS: dict[str, dict[str, Callable[..., Any]]] = {
    "discriminator": {
        "double backward, joint, stock layers": joint,
        "double backward, a side at a time": by(method="double_backward"),
        "forward over reverse, pairs of one": by(method="forward_over_reverse", micro_batch=1),
        "piecewise": by(),
        "piecewise, pairs of one": by(micro_batch=1),
        "piecewise, two pairs at once": by(micro_batch=2),
        "piecewise, all pairs at once": by(micro_batch=8),
    },
    "generator": {"stock layers": published_generator, "lean": lean_generator},
}


def inputs(smoke: bool, device: str = "cpu") -> tuple[R3GANDiscriminator, Tensor, Tensor]:
    """Every weight drawn, for the initial ones leave out all the blocks."""
    torch.manual_seed(0)
    with torch.device(device):
        D = R3GANDiscriminator([8, 16], [2, 4], [1, 1]) if smoke else R3GANDiscriminator()
    for name, p in D.named_parameters():
        if "LinearLayer3" in name:
            torch.nn.init.normal_(p, std=0.01)
    return D, *(torch.randn(2 if smoke else 8, 3, D.size, D.size, device=device) for _ in range(2))


@pytest.mark.parametrize("step", STEPS)
def bench_bytes(bench_record: Callable[..., None], benchmark: Any, smoke: bool, step: str) -> None:
    first = None
    for name, run in STEPS[step].items():
        with FakeTensorMode(allow_non_fake_inputs=True):
            D, real, fake = inputs(smoke)
            with ByteTracker() as bytes:
                run(D, real, fake)
        first = first or bytes.peak
        row = {"peak_mib": round(bytes.peak / MIB, 1), "ratio": float(f"{bytes.peak / first:.3g}")}
        bench_record("adversarial", name=name, what=f"{step} step, peak MiB, gradients included", **row)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", STEPS)
def bench_seconds(compare: Callable[..., dict[str, float]], smoke: bool, step: str, device: str) -> None:
    D, real, fake = inputs(smoke, device)
    optimizer = torch.optim.Adam(D.parameters(), 1e-5)

    def whole(run: Callable[..., Any]) -> Callable[[], None]:
        def once() -> None:
            optimizer.zero_grad()
            run(D, real, fake)
            if step == "discriminator":
                optimizer.step()

        return once

    # On a CPU the default is pairs of one; all at once is measured where it is the default.
    runs = {name: whole(run) for name, run in STEPS[step].items() if "piecewise," not in name or device != "cpu"}
    compare("adversarial", runs, 2 if device == "cpu" else 15, device, what=f"{step} step, seconds")
