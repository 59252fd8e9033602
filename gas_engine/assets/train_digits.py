"""Make the embedded data set and teacher network: ``python -m gas_engine.assets.train_digits``.

Reads scikit-learn's copy of the UCI handwritten digits (1,797 images, 8x8, ten classes), writes ``digits.npz`` and
trains a class-conditional EDM network on 1,597 of them (``digits.safetensors``). Seeds are fixed: the same machine
and library versions give the same file. Needs scikit-learn, which nothing else in the package does.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from gas_engine.adapters.digits import HELD_OUT
from gas_engine.adapters.edm import save_edm
from gas_engine.networks import build_edm

HERE = Path(__file__).parent
NETWORK = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 10, "sigma_min": 0.002, "sigma_max": 80.0,
    "model_type": "SongUNet", "model_channels": 32, "channel_mult": [1], "num_blocks": 1,
    "attn_resolutions": [], "dropout": 0.1,
}  # fmt: skip
ITERATIONS, BATCH, RATE, EMA, SEED = 2500, 128, 2e-3, 0.998, 0


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [-1, 1] and classes [1797], shuffled once with a fixed seed."""
    from sklearn import datasets

    digits = datasets.load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.images))
    images, classes = digits.images[order].astype(np.uint8), digits.target[order].astype(np.uint8)
    np.savez_compressed(HERE / "digits.npz", images=images, classes=classes)
    return torch.from_numpy(images).float()[:, None] / 8 - 1, torch.from_numpy(classes).long()


def denoising_loss(network: torch.nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """EDM's weighted denoising loss (arXiv 2206.00364, Table 1): log sigma ~ N(-1.2, 1.2^2), weight 1/c_out^2."""
    sigma = (torch.randn(len(x), 1, 1, 1, generator=generator) * 1.2 - 1.2).exp()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    noisy = x + sigma * torch.randn(x.shape, generator=generator)
    return (weight * (network(noisy, sigma, labels) - x).square()).mean()


def main() -> None:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, classes = load_digits()
    labels = torch.nn.functional.one_hot(classes, 10).float()
    train, held = slice(HELD_OUT, None), slice(0, HELD_OUT)
    train_images, train_labels = images[train], labels[train]

    network = build_edm(NETWORK).train().requires_grad_(True)
    shadow = build_edm(NETWORK, network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.9, 0.99))
    start = time.time()
    for step in track(range(ITERATIONS), description="digits"):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / ITERATIONS))
        rows = torch.randint(len(train_images), (BATCH,), generator=generator)
        loss = denoising_loss(network, train_images[rows], train_labels[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, parameter in zip(shadow.parameters(), network.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)

    quality = {}
    for name, part in (("train", train), ("held_out", held)):
        generator.manual_seed(SEED + 1)
        with torch.no_grad():
            losses = [denoising_loss(shadow, images[part], labels[part], generator) for _ in range(20)]
        quality[name] = round(float(torch.stack(losses).mean()), 4)
    seconds = round(time.time() - start)
    save_edm(
        shadow, NETWORK, HERE / "digits.safetensors", denoising_loss=quality, iterations=ITERATIONS, seed=SEED,
        t_eps=1e-3,
    )  # fmt: skip
    size = (HERE / "digits.safetensors").stat().st_size / 2**20
    count = sum(p.numel() for p in shadow.parameters())
    print(f"{count:,} parameters, {size:.2f} MiB, {seconds} s, weighted denoising loss {quality}")


if __name__ == "__main__":
    main()
