"""Make the embedded data set and a network of it: ``python -m gas_engine.assets.train_digits [digits-guided]``.

Reads scikit-learn's copy of the UCI handwritten digits (1,797 images, 8x8, ten classes), writes ``digits.npz`` and
trains a class-conditional EDM network on 1,597 of them (``digits.safetensors``; ``digits-guided.safetensors`` is told
no class of 15 % of the images, so that guidance has something to lead away from). Seeds are fixed: the same machine
and library versions give the same file. Needs scikit-learn, which nothing else in the package does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gas_engine.adapters.digits import HELD_OUT
from gas_engine.adapters.edm import save_edm
from gas_engine.assets.fitting import fit, mean_loss

HERE = Path(__file__).parent
NETWORK = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 10, "sigma_min": 0.002, "sigma_max": 80.0,
    "model_type": "SongUNet", "model_channels": 32, "channel_mult": [1], "num_blocks": 1,
    "attn_resolutions": [], "dropout": 0.1,
}  # fmt: skip
# What else a model's network is made with.
MODELS: dict[str, dict[str, float]] = {"digits": {}, "digits-guided": {"label_dropout": 0.15}}
ITERATIONS, BATCH, RATE, EMA, SEED = 2500, 128, 2e-3, 0.998, 0


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [-1, 1] and classes [1797], shuffled once with a fixed seed."""
    from sklearn import datasets

    digits = datasets.load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.images))
    images, classes = digits.images[order].astype(np.uint8), digits.target[order].astype(np.uint8)
    np.savez_compressed(HERE / "digits.npz", images=images, classes=classes)
    return torch.from_numpy(images).float()[:, None] / 8 - 1, torch.from_numpy(classes).long()


def main(model: str = "digits") -> None:
    arguments, path = NETWORK | MODELS[model], HERE / f"{model}.safetensors"
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, classes = load_digits()
    labels = torch.nn.functional.one_hot(classes, 10).float()
    train, held = slice(HELD_OUT, None), slice(0, HELD_OUT)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images[train]), (BATCH,), generator=generator)
        return images[train][rows], labels[train][rows]

    start = time.time()
    network = fit(arguments, batch, ITERATIONS, RATE, EMA, generator)
    quality = {
        name: mean_loss(network, lambda _: (images[part], labels[part]), 20, generator.manual_seed(SEED + 1))  # noqa: B023
        for name, part in (("train", train), ("held_out", held))
    }
    seconds = round(time.time() - start)
    save_edm(network, arguments, path, denoising_loss=quality, iterations=ITERATIONS, seed=SEED, t_eps=1e-3)
    size = path.stat().st_size / 2**20
    count = sum(p.numel() for p in network.parameters())
    print(f"{count:,} parameters, {size:.2f} MiB, {seconds} s, weighted denoising loss {quality}")


if __name__ == "__main__":
    main(*sys.argv[1:])
