"""Maximum mean discrepancies of two sets of features: KID's polynomial kernel, CMMD's Gaussian one.

Shape legend: N, M samples, F features. Kernels are taken by blocks of rows, 128 MiB at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]
BLOCK = 2**24  # entries of a kernel at a time


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Kernel distance (KID, with Inception's features): the unbiased squared MMD under ``k(x, y) = (x.y / F + 1)^3``.

    ``mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j)`` (arXiv 1801.01401, section 4) over
    all samples, float64; it may be below zero. Published figures are means of the same over random subsets of 1,000,
    which has the same expectation and more noise. Raises ValueError for fewer than 2 samples, or lengths that differ.

        kernel_distance(features(real), features(samples))
    """
    x, y = checked(real, fake)

    def cubic(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def others(a: Tensor) -> float:
        own = float(((a.square().sum(1) / a.shape[1] + 1) ** 3).sum())
        return (_sum(cubic, a, a) - own) / (len(a) * (len(a) - 1))

    return others(x) + others(y) - 2 * _sum(cubic, x, y) / (len(x) * len(y))


def gaussian_distance(real: Tensor, fake: Tensor, width: float = 10.0) -> float:
    """CMMD, with CLIP's features: 1000 times the squared MMD under ``exp(-|x - y|^2 / (2 width^2))``.

    Features are scaled to unit length first and the diagonals stay in, as published (arXiv 2401.09603); float64.
    Raises ValueError for fewer than 2 samples, or lengths that differ.

        gaussian_distance(clip(real), clip(samples))
    """
    x, y = (torch.nn.functional.normalize(v, dim=1) for v in checked(real, fake))

    def gaussian(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp((a @ b.T - 1) / width**2)  # of unit vectors: |a - b|^2 = 2 - 2 a.b

    one, two, mixed = (_sum(gaussian, a, b) / (len(a) * len(b)) for a, b in ((x, x), (y, y), (x, y)))
    return 1000 * (one + two - 2 * mixed)


def _sum(kernel: Kernel, a: Tensor, b: Tensor) -> float:
    return sum(float(kernel(rows, b).sum()) for rows in a.split(rows_beside(b)))


def rows_beside(b: Tensor) -> int:
    """How many rows of a kernel or of distances to b [M, F] are made at a time."""
    return max(1, BLOCK // len(b))


def checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"two sets of at least 2 samples of the same features, got {list(a.shape)}, {list(b.shape)}")
    return a.detach().double(), b.detach().double()
