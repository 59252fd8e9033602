"""Make the features of the embedded data: ``python -m gas_engine.assets.train_features``.

Trains two small classifiers and tells their accuracy on what they did not see: of the digits, on 1,597 of the images
(``features.safetensors``); and of crops of the photographs, which of 6 each is of, at which of 3 scales
(``photo_features.safetensors``). Seeds are fixed: the same machine and library versions give the same files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor

from gas_engine.adapters.digits import ASSETS, HELD_OUT, digit_images
from gas_engine.adapters.photos import labelled_crops
from gas_engine.files import atomic
from gas_engine.metrics.features import EMBEDDED

ITERATIONS, BATCH, RATE, DECAY, SEED = 1500, 128, 3e-3, 0.05, 0
Labelled = tuple[Tensor, Tensor]


def fit(model: str, draw: Callable[[], Labelled], unseen: Labelled) -> None:
    """Train the classifier of an embedded model on batches of (images, classes), and write it."""
    torch.manual_seed(SEED)
    network = EMBEDDED[model].network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    start = time.time()
    for step in range(ITERATIONS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (0.5 + 0.5 * math.cos(math.pi * step / ITERATIONS))
        images, classes = draw()
        loss = torch.nn.functional.cross_entropy(network(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, classes = unseen
    with torch.no_grad():
        accuracy = round(float((network.eval()(images).argmax(1) == classes).float().mean()), 4)
    path = ASSETS / EMBEDDED[model].file
    with atomic(path) as temporary:
        save_file(network.state_dict(), temporary, {"accuracy": str(accuracy), "seed": str(SEED)})
    count, size = sum(p.numel() for p in network.parameters()), path.stat().st_size / 1024
    print(f"{model}: {count:,} parameters, {size:.0f} KiB, {time.time() - start:.0f} s, {accuracy:.1%} of unseen right")


def main() -> None:
    images, classes = digit_images()

    def digits() -> Labelled:
        rows = torch.randint(len(classes) - HELD_OUT, (BATCH,)) + HELD_OUT
        return images[rows], classes[rows]

    fit("digits", digits, (images[:HELD_OUT], classes[:HELD_OUT]))
    generator = torch.Generator().manual_seed(SEED)
    unseen = labelled_crops(2000, torch.Generator().manual_seed(SEED + 1))
    fit("photos", lambda: labelled_crops(BATCH, generator), unseen)


if __name__ == "__main__":
    main()
