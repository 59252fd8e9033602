"""How the embedded networks were trained: EDM's denoising loss, Adam with a cosine rate, an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from gas_engine.networks import build_edm
from gas_engine.networks.preconditioning import EDMNetwork

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor | None]]


def denoising_loss(network: nn.Module, x: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """EDM's weighted denoising loss (arXiv 2206.00364, Table 1): log sigma ~ N(-1.2, 1.2^2), weight 1/c_out^2."""
    sigma = (torch.randn(len(x), 1, 1, 1, generator=generator) * 1.2 - 1.2).exp()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    noisy = x + sigma * torch.randn(x.shape, generator=generator)
    return (weight * (network(noisy, sigma, labels) - x).square()).mean()


def fit(
    arguments: dict[str, Any], draw: Draw, iterations: int, rate: float, ema: float, generator: torch.Generator,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> EDMNetwork:  # fmt: skip
    """Train ``build_edm(arguments)`` on batches of ``draw(generator)``: (images, one-hot labels or None).

    Returns the network of averaged weights. The rate rises over 100 updates and falls as a cosine.
    """
    network = build_edm(arguments).train().requires_grad_(True).to(memory_format=memory_format)
    shadow = build_edm(arguments, network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.99))
    for step in track(range(iterations), description="network"):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / iterations))
        loss = denoising_loss(network, *draw(generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, parameter in zip(shadow.parameters(), network.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
    return shadow


@torch.no_grad()
def mean_loss(network: nn.Module, draw: Draw, draws: int, generator: torch.Generator) -> float:
    """The denoising loss over several draws of batches and noise, to four digits."""
    losses = [denoising_loss(network, *draw(generator), generator) for _ in range(draws)]
    return round(float(torch.stack(losses).mean()), 4)
