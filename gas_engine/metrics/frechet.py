"""The Frechet distance of two sets of features, or of one and published statistics; diversity.

Shape legend: N samples, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normal:
    """A normal distribution: its mean [F], and a factor R [min(N, F), F] of its covariance ``R^T R``, float64.

    Of N <= F samples the covariance is singular; the factor loses nothing there, and is the smaller of the two.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Normal:
        """That of features [N, F], with the unbiased covariance. Raises ValueError below N = 2 or if not finite."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"a Frechet distance is of at least 2 samples [N, F], got {list(features.shape)}")
        x = features.detach().cpu().double()
        if not bool(x.isfinite().all()):
            raise ValueError("the features are not all finite; look at the samples before measuring their distance")
        mean = x.mean(0)
        return cls(mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r")[1])

    @classmethod
    def of_statistics(cls, mu: Any, sigma: Any) -> Normal:
        """That of a mean [F] and a covariance [F, F], as published beside data sets.

        ``sigma = V diag(w) V^T`` has the factor ``diag(w)^(1/2) V^T``. Raises ValueError for what is no mean and
        covariance: other shapes, not finite, not symmetric, or with eigenvalues below what rounding leaves.
        """
        mean, sigma = (torch.as_tensor(v).detach().cpu().double() for v in (mu, sigma))
        if mean.ndim != 1 or not len(mean) or sigma.shape != (len(mean), len(mean)):
            raise ValueError(f"mu must be [F] and sigma [F, F], got {list(mean.shape)} and {list(sigma.shape)}")
        if not bool(mean.isfinite().all() & sigma.isfinite().all()):
            raise ValueError("mu and sigma are not all finite")
        size = float(sigma.diagonal().abs().max())
        if float((sigma - sigma.T).abs().max()) > 1e-4 * size:
            raise ValueError("sigma is no covariance: it is not symmetric")
        values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
        if float(values[0]) < -1e-4 * size:
            raise ValueError(f"sigma is no covariance: it has an eigenvalue of {float(values[0]):.3g}")
        return cls(mean, values.clamp(min=0).sqrt()[:, None] * vectors.T)


def frechet_distance(a: Tensor | Normal, b: Tensor | Normal) -> float:
    """Squared Frechet distance of two normal distributions: FID, with Inception's features.

    ``|mu - mu'|^2 + tr(C + C' - 2 (C C')^(1/2))`` (arXiv 1706.08500, equation 6), float64, of features [N, F] and
    [M, F], or of ``Normal``s. With factors ``C = R^T R`` the trace of the root is the sum of the singular values of
    ``R R'^T``: neither a covariance nor a root of one is made, so nothing is lost where N <= F leaves them singular.
    Biased by N, in which it falls: compare figures of equally large sets. Memory: R, R' and their product.
    Raises ValueError for fewer than 2 samples, or features of two lengths or not finite.

        frechet_distance(features(samples), features(real))
        frechet_distance(features(samples), Normal.of_statistics(file["mu"], file["sigma"]))
    """
    lengths = [len(x.mean) if isinstance(x, Normal) else x.shape[-1] for x in (a, b)]
    if lengths[0] != lengths[1]:
        shapes = [[lengths[i]] if isinstance(x, Normal) else list(x.shape) for i, x in enumerate((a, b))]
        raise ValueError(f"two sets of at least 2 samples of the same features, got {shapes[0]}, {shapes[1]}")
    one, two = (x if isinstance(x, Normal) else Normal.of(x) for x in (a, b))
    shift = (one.mean - two.mean).square().sum()
    both = one.factor.square().sum() + two.factor.square().sum()
    trace = torch.linalg.svdvals(one.factor @ two.factor.T).sum()
    return float((shift + both - 2 * trace).clamp(min=0))  # of equal sets, rounding may leave less


def diversity(features: Tensor) -> float:
    """Trace of the covariance of features [N, F]: half the mean squared distance of two samples, float64.

    Unbiased at any N and linear in it, where a mean over pairs is quadratic. Raises ValueError for fewer than 2.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"diversity is of at least 2 samples [N, F], got {list(features.shape)}")
    return float(features.detach().double().var(0).sum())
