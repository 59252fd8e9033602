"""What every exponential-integrator solver shares: phi functions, step sizes, divided differences, bands.

Shape legend: K steps, J lags (0 is the newest evaluation). float64, vectorised over the steps, differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..schedule import Schedule

_SERIES_BELOW = 1e-2
_SERIES_TERMS = 8


def phi(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """phi1 = expm1(-h), phi2 = phi1/h + 1, phi3 = phi2/h - 1/2, by their Taylor series where |h| < 1e-2.

    The closed forms lose every digit to cancellation as h shrinks (DPM-Solver++, arXiv 2211.01095, appendix B).
    """
    phi1 = torch.expm1(-h)
    small = h.detach().abs() < _SERIES_BELOW
    if not bool(small.any()):
        phi2 = phi1 / h + 1
        return phi1, phi2, phi2 / h - 0.5
    safe = torch.where(small, torch.ones_like(h), h)
    phi2 = torch.expm1(-safe) / safe + 1
    phi3 = phi2 / safe - 0.5
    # phi2 = sum_{k>=1} -(-h)^k / (k+1)!,  phi3 = sum_{k>=1} (-h)^k / (k+2)!
    powers = (-h)[..., None] ** torch.arange(1, _SERIES_TERMS + 1, dtype=h.dtype)
    factorial = torch.cumprod(torch.arange(2, _SERIES_TERMS + 3, dtype=h.dtype), 0)
    series2 = -(powers / factorial[:-1]).sum(-1)
    series3 = (powers / factorial[1:]).sum(-1)
    return phi1, torch.where(small, series2, phi2), torch.where(small, series3, phi3)


@dataclass(frozen=True)
class Steps:
    """Per-step quantities of a grid of times t[0..K], each [K]; alpha_next and sigma_next are at t[n+1]."""

    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    lam: Tensor  # [K+1]
    h: Tensor

    @classmethod
    def of(cls, schedule: Schedule, times: Tensor) -> Steps:
        alpha, sigma, lam = schedule(times)
        return cls(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], lam, lam[1:] - lam[:-1])


def checked_times(schedule: Schedule, times: Tensor) -> Tensor:
    """``times`` as float64, or ValueError unless they are K+1 >= 2 strictly falling times inside the schedule."""
    times = times.to("cpu", torch.float64) if isinstance(times, Tensor) else torch.tensor(times, dtype=torch.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be one row of at least two, from noise to data, got shape {tuple(times.shape)}")
    low, high = schedule.domain
    seen = times.detach()
    if not bool((seen[1:] < seen[:-1]).all()) or not low < float(seen[-1]) or not float(seen[0]) < high:
        raise ValueError(f"times must fall strictly within ({low:.3g}, {high:.3g}), got {seen.tolist()}")
    return times


def dpmpp_terms(steps: Steps, orders: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DPM-Solver++ multistep, orders 1 to 3 per step: (ratio [K], gains [K, 3], differences [K, 3, 3]).

        x[n+1] = ratio x[n] + sum_i gains[i] sum_j differences[i, j] m[n-j]

    with data estimates m (arXiv 2211.01095, algorithm 2 and appendix B; third order with D1, D2 of section 3 of the
    theory): m_0; then D10 at order 2 or D1 at order 3; then D2.
    """
    h = steps.h
    phi1, phi2, phi3 = phi(h)
    second, third = (orders == 2).to(h.dtype), (orders >= 3).to(h.dtype)
    one = torch.ones_like(h)
    # 1/r0 and 1/r1 where there is a history, one where there is none (and nothing multiplies it).
    i0 = torch.cat([one[:1], h[1:] / h[:-1]])
    i1 = torch.cat([one[:2], h[2:] / h[:-2]])[: len(h)]
    r0 = 1 / i0
    weight = third / (r0 + 1 / i1)
    d10 = torch.stack([i0, -i0, torch.zeros_like(h)], -1)
    bend = torch.stack([i0, -(i0 + i1), i1], -1)  # D10 - D11
    newest = torch.stack([one, 0 * one, 0 * one], -1)
    # At order 2 the weight is zero, and the middle difference is D10 itself.
    differences = torch.stack([newest, d10 + (weight * r0)[:, None] * bend, weight[:, None] * bend], 1)
    gains = torch.stack([-phi1, third * phi2 - second * phi1 / 2, -third * phi3], -1)
    return steps.sigma_next / steps.sigma, steps.alpha_next[:, None] * gains, differences


def euler_terms(steps: Steps, prediction: str) -> tuple[Tensor, Tensor]:
    """The exponential Euler step ``x[n+1] = ratio x[n] + gain S[n]`` on "data" or "noise" estimates S, each [K]."""
    if prediction == "data":
        return steps.sigma_next / steps.sigma, -steps.alpha_next * torch.expm1(-steps.h)
    return steps.alpha_next / steps.alpha, -steps.sigma_next * torch.expm1(steps.h)


@lru_cache(maxsize=64)
def _bands(steps: int, lags: int) -> tuple[Tensor, Tensor]:
    """For M[n, k]: its lag n - k, cut to what exists, and whether it is none of 0 .. lags-1."""
    index = torch.arange(steps)
    lag = index[:, None] - index[None, :]
    return lag.clamp(0, lags - 1), (lag < 0) | (lag >= lags)


def band(weights: Tensor) -> Tensor:
    """Lower-triangular M [K, K] with ``M[n, n-j] = weights[n, j]``; lags that reach before the first step drop out."""
    lag, outside = _bands(*weights.shape)
    return weights.gather(1, lag).masked_fill(outside, 0.0)


def triangle(values: Tensor, steps: int) -> Tensor:
    """Lower-triangular M [K, K] whose rows one after the other are ``values`` [K (K+1) / 2]."""
    row, column = torch.tril_indices(steps, steps)
    return values.new_zeros(steps, steps).index_put((row, column), values)


def packed(matrix: Tensor) -> Tensor:
    """Inverse of ``triangle``."""
    row, column = torch.tril_indices(*matrix.shape)
    return matrix[row, column]
