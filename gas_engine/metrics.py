"""Figures of sets of samples: a Frechet distance on features, power at high frequencies, diversity.

Shape legend: N samples, F features, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .adapters.digits import ASSETS, HELD_OUT, digit_images

Features = Callable[[Tensor], Tensor]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the normal distributions with the means and covariances of two sets of features.

    ``|mu - mu'|^2 + tr(C + C' - 2 (C C')^(1/2))`` (arXiv 1706.08500, equation 6), float64, of a [N, F] and b [M, F].
    With centred sets ``X = Q R`` and ``X' = Q' R'``, scaled such that ``C = R^T R``, the trace of the root is the sum
    of the singular values of ``R R'^T``: neither a covariance nor a root of one is made, so nothing is lost where
    N <= F leaves them singular. It falls with N: compare figures of equally large sets.
    Raises ValueError for fewer than 2 samples, or features of two lengths or not finite.

        frechet_distance(features(samples), features(real))
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"two sets of at least 2 samples of the same features, got {list(a.shape)}, {list(b.shape)}")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    if not bool(a.isfinite().all() & b.isfinite().all()):
        raise ValueError("the features are not all finite; look at the samples before measuring their distance")
    r, s = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r")[1] for x in (a, b))
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + r.square().sum() + s.square().sum() - 2 * torch.linalg.svdvals(r @ s.T).sum())


def diversity(features: Tensor) -> float:
    """Trace of the covariance of features [N, F]: half the mean squared distance of two samples, float64.

    Unbiased at any N and linear in it, where a mean over pairs is quadratic. Raises ValueError for fewer than 2.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"diversity is of at least 2 samples [N, F], got {list(features.shape)}")
    return float(features.detach().double().var(0).sum())


def high_frequency_power(images: Tensor) -> float:
    """Mean square, per pixel, of what images [N, C, H, W] have above half the Nyquist frequency in any direction.

    Summed over ``|(f_y, f_x)| > 1/4`` cycles per pixel of the Fourier transform's squares (Parseval), averaged over N
    and C. Absolute, no share of the whole: images of less contrast are missing detail too. Any unit, squared; float64.
    """
    if images.ndim != 4:
        raise ValueError(f"images are [N, C, H, W], got {list(images.shape)}")
    height, width = images.shape[-2:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]).to(images.device)
    power = torch.fft.fft2(images.detach().double(), norm="forward").abs().square()
    return float((power * (radius > 0.25)).sum((-2, -1)).mean())


class DigitFeatures(nn.Module):
    """A small classifier of 8x8 digits: images [N, 1, 8, 8] in [-1, 1] -> logits [N, 10]; ``features`` [N, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.SiLU(),
            nn.Conv2d(24, 64, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))


def digits_features(batch: int = 512) -> Features:
    """Features of the embedded digits, on the CPU: images [N, 1, 8, 8] in [-1, 1] -> [N, 64], float32, no gradient.

    The last layer before the classes of a network trained by ``assets/train_features.py``. Frechet distances on them
    are of this network: they mean nothing beside FIDs of Inception's.
    """
    network = DigitFeatures()
    network.load_state_dict(load_file(ASSETS / "features.safetensors"))
    network.eval().requires_grad_(False)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8):
            raise ValueError(f"these are features of digits, [N, 1, 8, 8]; got {list(images.shape)}")
        return torch.cat([network.features(part) for part in images.detach().cpu().float().split(batch)])

    return features


@dataclass(frozen=True)
class Judge:
    """Features by which samples are judged, and those of the data, [M, F]."""

    features: Features
    data: Tensor

    def distances(self, samples: Tensor, teacher: Tensor) -> tuple[float, float] | None:
        """Frechet distances of samples [N, ...] to the data and to the teacher; None if not all are finite."""
        if not bool(samples.isfinite().all()):
            return None
        mine = self.features(samples)
        return frechet_distance(mine, self.data), frechet_distance(mine, self.features(teacher))


def judge_of(model: str) -> Judge | None:
    """The judge that comes with a model; None for all but the embedded digits."""
    if model != "digits":
        return None
    features = digits_features()
    return Judge(features, features(real_digits()))


def real_digits() -> Tensor:
    """The 1,597 images that the embedded networks were trained on, [1597, 1, 8, 8] in [-1, 1]: the reference set."""
    return digit_images()[0][HELD_OUT:]
