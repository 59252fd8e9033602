"""Power over spatial frequency: what of an image is fine detail.

Shape legend: N samples, C channels, H W height and width, R rings of frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def high_frequency_power(images: Tensor) -> float:
    """Mean square, per pixel, of what images [N, C, H, W] have above half the Nyquist frequency in any direction.

    Summed over ``|(f_y, f_x)| > 1/4`` cycles per pixel of the Fourier transform's squares (Parseval), averaged over N
    and C. Absolute, no share of the whole: images of less contrast are missing detail too. Any unit, squared; float64.
    """
    power = _power(images)
    return float((power * (_radius(*power.shape).to(power.device) > 0.25)).sum())


def radial_power(images: Tensor) -> Tensor:
    """Mean power per Fourier coefficient in rings of frequencies, of images [N, C, H, W] -> [R], float64.

    Ring r holds the coefficients nearest to r / min(H, W) cycles per pixel; averaged over N and C. Times the counts of
    ``rings`` and summed it is the images' mean square (Parseval).

        frequencies, counts = rings(H, W)
        plt.loglog(frequencies[1:], radial_power(samples)[1:])
    """
    power = _power(images)
    ring = _rings(*power.shape).to(power.device)
    total = torch.zeros(int(ring.max()) + 1, dtype=torch.float64, device=power.device)
    total.index_add_(0, ring.flatten(), power.flatten())
    return total.cpu() / rings(*power.shape)[1].clamp(min=1)


def rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Frequencies of the rings in cycles per pixel, and how many coefficients each holds, [R] and [R]."""
    counts = torch.bincount(_rings(height, width).flatten()).double()
    return torch.arange(len(counts), dtype=torch.float64) / min(height, width), counts


def _power(images: Tensor) -> Tensor:
    """Squares of the Fourier transform, averaged over N and C, [H, W]."""
    if images.ndim != 4:
        raise ValueError(f"images are [N, C, H, W], got {list(images.shape)}")
    return torch.fft.fft2(images.detach().double(), norm="forward").abs().square().mean((0, 1))


def _radius(height: int, width: int) -> Tensor:
    return torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])


def _rings(height: int, width: int) -> Tensor:
    return (_radius(height, width).double() * min(height, width)).round().long()
