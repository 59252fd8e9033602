"""Make the features of the embedded digits: ``python -m gas_engine.assets.train_features``.

Trains a small classifier on 1,597 of the images of ``digits.npz`` (``features.safetensors``) and tells its accuracy
on the 200 held out. Seeds are fixed: the same machine and library versions give the same file.
"""

from __future__ import annotations

import math
import time

import torch
from safetensors.torch import save_file

from gas_engine.adapters.digits import ASSETS, HELD_OUT, digit_images
from gas_engine.files import atomic
from gas_engine.metrics import DigitFeatures

ITERATIONS, BATCH, RATE, DECAY, SEED = 1500, 128, 3e-3, 0.05, 0


def main() -> None:
    torch.manual_seed(SEED)
    images, classes = digit_images()
    train, held = slice(HELD_OUT, None), slice(0, HELD_OUT)
    network = DigitFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    start = time.time()
    for step in range(ITERATIONS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (0.5 + 0.5 * math.cos(math.pi * step / ITERATIONS))
        rows = torch.randint(len(classes) - HELD_OUT, (BATCH,)) + HELD_OUT
        loss = torch.nn.functional.cross_entropy(network(images[rows]), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        right = network(images).argmax(1) == classes
    accuracy = {name: round(float(right[part].float().mean()), 4) for name, part in (("train", train), ("test", held))}
    path = ASSETS / "features.safetensors"
    with atomic(path) as temporary:
        save_file(network.state_dict(), temporary, {"accuracy": str(accuracy), "seed": str(SEED)})
    count = sum(p.numel() for p in network.parameters())
    print(f"{count:,} parameters, {path.stat().st_size / 1024:.0f} KiB, {time.time() - start:.0f} s, {accuracy}")


if __name__ == "__main__":
    main()
