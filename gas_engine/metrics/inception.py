"""Inception's features, by which published FIDs are taken, through the torch-fidelity package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import sha256
from .features import Extractor

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
SPATIAL = 7  # channels of Mixed_6d's first branch, whose 17x17 values are sFID's features (arXiv 2103.03841)


def inception_weights() -> Path:
    """Where torch keeps the weights, there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


def inception_features(device: torch.device | str = "cpu", weights: Path | None = None) -> Extractor:
    """The 2,048 pooled features of Inception v3 as ported from the published graph, and sFID's 2,023 spatial ones.

    Images [N, 1 or 3, H, W] in [-1, 1] are rounded to eight bits, as published figures are of image files, and resized
    within the network to 299x299 as TensorFlow 1 did. Raises ValueError where the package or its weights are missing,
    saying how to get them.

        frechet_distance(inception_features("cuda").features(samples), Normal.of_statistics(mu, sigma))
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError("Inception's features need torch-fidelity: `pip install torch-fidelity`") from None
    path = weights or inception_weights()
    if not path.is_file():
        raise ValueError(
            f"Inception's weights are not in {path}; get them with `curl -L --create-dirs -o {path} {URL}`"
        )
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # refuses whatever is more than tensors
        network: Any = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # of a pickle, or of names and shapes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} does not hold Inception's weights ({reason:.200}); delete and fetch it again"
        ) from None
    network = network.to(device).eval().requires_grad_(False)
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))

    @torch.no_grad()
    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"Inception sees grey or RGB images, got {list(images.shape)}; use --features FILE.pt")
        levels = eight_bits(images).expand(-1, 3, -1, -1)
        seen.clear()
        (pooled,) = network(levels.to(device))
        spatial = seen.pop()[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)  # in the order of published statistics
        return pooled.float().cpu(), spatial.float().cpu()

    return Extractor("Inception", sha256(path), both)


def eight_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> levels 0..255, uint8, rounded and clipped."""
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
