"""Make the embedded photographs and their network: ``python -m gas_engine.assets.train_photos``.

Reads six sample photographs that ship with scikit-learn and scikit-image, writes them at a shorter side of 96 pixels
(``photos.npz``), and trains an EDM network without classes on crops of 32x32 (``photos.safetensors``). Seeds are fixed:
the same machine and library versions give the same file. Needs scikit-learn, scikit-image and Pillow.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from gas_engine.adapters.edm import save_edm
from gas_engine.adapters.photos import SCALES, photo_crops
from gas_engine.assets.fitting import fit, mean_loss

HERE = Path(__file__).parent
NETWORK = {
    "img_resolution": 32, "img_channels": 3, "label_dim": 0, "sigma_min": 0.002, "sigma_max": 80.0,
    "model_type": "SongUNet", "model_channels": 32, "channel_mult": [1, 2, 3], "num_blocks": 1,
    "attn_resolutions": [8], "dropout": 0.0,
}  # fmt: skip
ITERATIONS, BATCH, RATE, EMA, SEED = 5200, 32, 2e-3, 0.999, 0


def write_photos() -> None:
    """The photographs, colour, [H, W, 3] uint8 with a shorter side of 96."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_image

    wholes = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    wholes |= {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    small = {}
    for name, whole in wholes.items():
        height, width = (round(length * max(SCALES) / min(whole.shape[:2])) for length in whole.shape[:2])
        small[name] = np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.LANCZOS))
    np.savez_compressed(HERE / "photos.npz", **small)  # type: ignore[arg-type]


def main() -> None:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    write_photos()
    start = time.time()
    network = fit(
        NETWORK, lambda g: (photo_crops(BATCH, g), None), ITERATIONS, RATE, EMA, generator, torch.channels_last
    )  # fmt: skip
    quality = mean_loss(network, lambda g: (photo_crops(256, g), None), 8, generator.manual_seed(SEED + 1))
    file = HERE / "photos.safetensors"
    save_edm(network, NETWORK, file, denoising_loss=quality, iterations=ITERATIONS, seed=SEED, t_eps=1e-3)
    count, seconds = sum(p.numel() for p in network.parameters()), round(time.time() - start)
    print(
        f"{count:,} parameters, {file.stat().st_size / 2**20:.2f} MiB, {seconds} s, weighted denoising loss {quality}"
    )


if __name__ == "__main__":
    main()
