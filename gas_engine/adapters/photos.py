"""The embedded model of photographs: a 32x32 RGB EDM network without classes, and the crops that it was trained on."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..denoiser import EDMDenoiser
from .digits import ASSETS
from .edm import load_edm

SIDE = 32
SCALES = (48, 64, 96)  # pixels of a photograph's shorter side, beside the crop's 32


def load_photos() -> EDMDenoiser:
    """The photographs' denoiser: states [B, 3, 32, 32] in [-1, 1], no classes, frozen float32 parameters."""
    return load_edm(ASSETS / "photos.safetensors", name="photos")


def photo_crops(count: int, generator: torch.Generator) -> Tensor:
    """Random crops of the embedded photographs, [count, 3, 32, 32] in [-1, 1]."""
    return labelled_crops(count, generator)[0]


def labelled_crops(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops, and which photograph at which scale each is of: 0 to 17, [count].

    Photograph, scale of ``SCALES``, place, and whether it is mirrored are drawn for each, all alike likely.
    """
    photos = _photos()
    numbers = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    crops = torch.empty(count, 3, SIDE, SIDE)
    labels = (numbers[:, 0] * len(photos)).long() * len(SCALES) + (numbers[:, 1] * len(SCALES)).long()
    for crop, label, (down, right, mirrored) in zip(crops, labels.tolist(), numbers[:, 2:].tolist(), strict=True):
        photo = photos[label // len(SCALES)][label % len(SCALES)]
        top, left = int(down * (photo.shape[1] - SIDE + 1)), int(right * (photo.shape[2] - SIDE + 1))
        found = photo[:, top : top + SIDE, left : left + SIDE]
        crop.copy_(found.flip(-1) if mirrored < 0.5 else found)
    return crops, labels


@lru_cache(maxsize=1)
def _photos() -> list[list[Tensor]]:
    """Every photograph at every scale, [3, H, W] in [-1, 1]."""
    with np.load(ASSETS / "photos.npz") as data:
        wholes = [torch.from_numpy(data[name]).permute(2, 0, 1).float() / 127.5 - 1 for name in sorted(data)]
    return [[_scaled(photo, side) for side in SCALES] for photo in wholes]


def _scaled(photo: Tensor, side: int) -> Tensor:
    """The photograph at a shorter side of ``side`` pixels."""
    height, width = (round(length * side / min(photo.shape[1:])) for length in photo.shape[1:])
    if (height, width) == tuple(photo.shape[1:]):
        return photo
    return torch.nn.functional.interpolate(photo[None], (height, width), mode="bilinear", antialias=True)[0]
