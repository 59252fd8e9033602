"""The embedded models of handwritten digits: 8x8 class-conditional EDM networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..denoiser import EDMDenoiser
from .edm import load_edm

DIGITS = ("digits", "digits-guided")
ASSETS = Path(__file__).parent.parent / "assets"
HELD_OUT = 200  # the first images, which no embedded network was trained on


def load_digits(name: str = "digits") -> EDMDenoiser:
    """The digits denoiser: states [B, 1, 8, 8] in [-1, 1], classes 0..9, 162,529 frozen float32 parameters.

    ``digits-guided`` knows samples of no class as well, the index 10, so that guidance has what to lead away from.
    """
    return load_edm(ASSETS / f"{name}.safetensors", name=name)


def digit_images() -> tuple[Tensor, Tensor]:
    """The data it was trained on: images [1797, 1, 8, 8] in [-1, 1] and classes [1797]."""
    with np.load(ASSETS / "digits.npz") as data:
        return torch.from_numpy(data["images"]).float()[:, None] / 8 - 1, torch.from_numpy(data["classes"]).long()
