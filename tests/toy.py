"""A model with a known answer: the exact denoiser of a Gaussian mixture, for every prediction type and schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gas_engine import Denoiser, Schedule
from gas_engine.conditioning import Classes

SHAPE = (2, 3, 3)


class Mixture(nn.Module):
    """Data estimate of a mixture of isotropic Gaussians, E[x_0 | x_t], expressed as any prediction type."""

    def __init__(self, schedule: Schedule, prediction: str, components: int = 3, width: float = 0.4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        means = torch.randn(components, *SHAPE, generator=generator, dtype=torch.float64)
        self.register_buffer("means", means)
        self.schedule, self.prediction, self.width = schedule, prediction, width
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls += 1
        alpha, sigma, _ = (value.to(x.dtype) for value in self.schedule(t))
        means = self.means.to(x.dtype)
        variance = alpha**2 * self.width**2 + sigma**2
        offset = x[:, None] - alpha * means
        weights = torch.softmax(-offset.square().flatten(2).sum(-1) / (2 * variance), dim=1)
        posterior = means + (alpha * self.width**2 / variance) * offset
        data = (weights[:, :, None, None, None] * posterior).sum(1)
        if cond is not None:
            data = data * (1 + 0.02 * cond.to(x.dtype)[:, None, None, None])
        noise = (x - alpha * data) / sigma
        if self.prediction == "data":
            return data
        if self.prediction == "noise":
            return noise
        return alpha * noise - sigma * data if self.prediction == "velocity" else noise - data


def mixture(schedule: Schedule | None = None, prediction: str = "data", classes: int | None = None) -> Denoiser:
    schedule = schedule or Schedule.vp_linear(0.1, 20.0)
    network = Mixture(schedule, prediction)
    return Denoiser(network, schedule, prediction, SHAPE, classes=classes, name="mixture")


def make() -> Denoiser:
    """Factory for the command line: ``--model toy:make``."""
    return mixture(classes=10)


def make_broken() -> Denoiser:
    """A model whose output is never finite."""
    schedule = Schedule.vp_linear(0.1, 20.0)
    return Denoiser(lambda x, t, cond: x * torch.nan, schedule, "data", SHAPE, name="broken")


def make_late_nan() -> Denoiser:
    """Finite for the teacher's plain times; NaN for most told times a student tries, never for its start."""
    denoiser = mixture()
    inner = denoiser.function

    def function(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return inner(x, t, cond) * (torch.nan if x.requires_grad else 1.0)

    return Denoiser(function, denoiser.schedule, "data", SHAPE, network=inner, name="late nan")


def noise(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


class Perceptron(nn.Module):
    """A small residual network with blocks and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(18) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        h = x.flatten(1) * (1 + t.to(x.dtype))
        for layer in self.layers:
            h = layer(h)
        return h.view_as(x)


def make_perceptron() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Perceptron(), Schedule.vp_linear(0.1, 20.0), "data", SHAPE, name="perceptron")


def make_guided() -> Denoiser:
    """The same with ten classes, which it ignores, and one of none."""
    plain = make_perceptron()
    return Denoiser(
        plain.function, plain.schedule, "data", SHAPE, conditioning=Classes(10, null=10), name="guided perceptron"
    )
