"""Precision, recall, density and coverage: which samples lie in balls around their nearest neighbours.

Shape legend: N real, M fake samples, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import checked, rows_beside


class Neighbours(NamedTuple):
    """Shares of samples; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: Tensor, fake: Tensor, k: int = 3, k_dense: int = 5) -> Neighbours:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797), of real [N, F], fake [M, F].

    A sample's ball reaches to its k-th nearest neighbour in its own set. Precision: the share of fake samples in the
    ball of a real one; recall: the share of real ones in the ball of a fake one; density: the number of real balls that
    a fake sample lies in, over ``k_dense``; coverage: the share of real samples with a fake one in their ball.
    ``k`` (of the first two) and ``k_dense`` (of the others) are those of their papers. float64; distances are made by
    blocks of rows, in O(N M F) time. Raises ValueError for fewer than k + 1 samples, or lengths that differ.

        neighbours(features(real), features(samples)).recall
    """
    x, y = checked(real, fake)
    most = max(k, k_dense)
    if min(k, k_dense) < 1 or min(len(x), len(y)) <= most:
        raise ValueError(f"{most} nearest neighbours need more samples than that, got {len(x)} and {len(y)}")
    near, dense = _radii(x, (k, k_dense))
    (fake_near,) = _radii(y, (k,))
    inside, balls = (torch.zeros(len(y), dtype=torch.long, device=y.device) for _ in range(2))
    recalled = covered = start = 0
    for rows in x.split(rows_beside(y)):
        far, part = torch.cdist(rows, y), slice(start, start + len(rows))
        inside += (far < near[part, None]).sum(0)
        balls += (far < dense[part, None]).sum(0)
        recalled += int((far < fake_near).any(1).sum())
        covered += int((far.amin(1) < dense[part]).sum())
        start += len(rows)
    precision, density = float((inside > 0).double().mean()), float(balls.double().mean()) / k_dense
    return Neighbours(precision, recalled / len(x), density, covered / len(x))


def _radii(x: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Distance of every sample to its k-th nearest other one, [N], for each k."""
    near = torch.cat([torch.cdist(rows, x).topk(max(ks) + 1, largest=False)[0] for rows in x.split(rows_beside(x))])
    return [near[:, k] for k in ks]  # the nearest is the sample itself
