"""Features of images: of the classifiers that come with the embedded models, or of a module that the user names.

Shape legend: N samples, C channels, H W height and width, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters.digits import ASSETS, DIGITS, HELD_OUT, digit_images
from ..files import sha256

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Extractor:
    """Features [N, F] of images [N, C, H, W] in [-1, 1], float32 on the CPU; spatial ones [N, S] where there are any.

    ``identity``: a checksum of what they are computed with.
    """

    name: str
    identity: str
    both: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    def features(self, images: Tensor) -> Tensor:
        return self.both(images)[0]


class SmallClassifier(nn.Module):
    """Convolutions, a mean over the pixels, classes: images [N, C, H, W] in [-1, 1] -> logits; ``features`` [N, F]."""

    def __init__(self, channels: int, widths: Sequence[int], strides: Sequence[int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width, stride in zip((channels, *widths), widths, strides, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1, stride=stride), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))


@dataclass(frozen=True)
class EmbeddedFeatures:
    """A classifier that comes with an embedded model: the file of its weights, and what it is made of."""

    file: str
    shape: tuple[int, int, int]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    classes: int

    def network(self) -> SmallClassifier:
        """With random weights."""
        return SmallClassifier(self.shape[0], self.widths, self.strides, self.classes)


# Trained by assets/train_features.py: to tell digits apart; to tell which photograph a crop is of, and at which scale.
EMBEDDED = {
    **dict.fromkeys(DIGITS, EmbeddedFeatures("features.safetensors", (1, 8, 8), (16, 24, 64), (1, 2, 1), 10)),
    "photos": EmbeddedFeatures("photo_features.safetensors", (3, 32, 32), (24, 32, 48, 64), (1, 2, 2, 2), 18),
}


def embedded_features(model: str, batch: int = 512) -> Features:
    """Features of an embedded model's images, on the CPU: [N, C, H, W] in [-1, 1] -> [N, 64], float32, no gradient.

    The last layer before the classes of a network trained by ``assets/train_features.py``. Frechet distances on them
    are of this network: they mean nothing beside FIDs of Inception's. Raises KeyError for other models, and ValueError
    for images of another shape.
    """
    made = EMBEDDED[model]
    network = made.network()
    network.load_state_dict(load_file(ASSETS / made.file))
    network.eval().requires_grad_(False)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != made.shape:
            shape = ", ".join(map(str, made.shape))
            raise ValueError(f"these are features of {model}, [N, {shape}]; got {list(images.shape)}")
        return torch.cat([network.features(part) for part in images.detach().cpu().float().split(batch)])

    return features


def features_of(model: str) -> Extractor | None:
    """The features that come with an embedded model; None for all others."""
    if model not in EMBEDDED:
        return None
    features = embedded_features(model)
    return Extractor(f"{model}'s classifier", sha256(ASSETS / EMBEDDED[model].file), lambda x: (features(x), None))


def torchscript_features(path: Path | str, device: torch.device | str = "cpu") -> Extractor:
    """Features of a TorchScript module: images [N, C, H, W] in [-1, 1], float32 -> [N, F].

    The module resizes and scales as its network wants; DINO's or CLIP's are made so with ``torch.jit.trace``. A
    TorchScript file is a program: it runs as soon as it is called, so name none that you would not run.
    Raises ValueError for what is no such file, and later for outputs of another shape.

        torch.jit.trace(module.eval(), torch.zeros(2, 3, 64, 64)).save("features.pt")
        torchscript_features("features.pt").features(images)
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of features {path}; give auto, inception, none, or a TorchScript .pt")
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is no TorchScript module, as torch.jit.save writes it ({reason:.200})") from None

    @torch.no_grad()
    def features(images: Tensor) -> tuple[Tensor, None]:
        try:
            found = module(images.float().to(device))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} does not take images {list(images.shape)} ({reason:.200})") from None
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            seen = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{path} must map images [N, C, H, W] to features [N, F], got {seen} of {len(images)}")
        return found.float().cpu(), None

    return Extractor(path.name, sha256(path), features)


def real_digits() -> Tensor:
    """The 1,597 images that the embedded networks were trained on, [1597, 1, 8, 8] in [-1, 1]: the reference set."""
    return digit_images()[0][HELD_OUT:]
