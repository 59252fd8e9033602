"""Grids of times for solvers: K+1 times, from ``t_start`` (noise) down to ``t_eps`` (data)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import Schedule

GRIDS = ("logSNR", "uniform", "quadratic", "karras")


def grid(kind: str, schedule: Schedule, steps: int, t_eps: float = 1e-3) -> Tensor:
    """K+1 falling times of the named grid, float64.

    "logSNR": even in lambda; "uniform": even in t; "quadratic": even in sqrt(t); "karras": even in
    (sigma/alpha)^(1/7) (arXiv 2206.00364, equation 5). Raises ValueError for an unknown name, steps < 1, or a t_eps
    outside the schedule.

        times = grid("quadratic", schedule, steps=6, t_eps=1e-3)
    """
    if kind not in GRIDS:
        raise ValueError(f"unknown grid {kind!r}; known: {', '.join(GRIDS)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    start = schedule.t_start
    if not schedule.domain[0] < t_eps < start:
        raise ValueError(f"t_eps must lie between {schedule.domain[0]:.3g} and {start:.3g}, got {t_eps}")
    ends = torch.tensor([start, t_eps], dtype=torch.float64)
    if kind == "uniform":
        return _between(ends, steps)
    if kind == "quadratic":
        return _pinned(_between(ends.sqrt(), steps).square(), ends)
    if kind == "logSNR":
        return _pinned(schedule.inverse(_between(schedule.lam(ends), steps)), ends)
    ratio = torch.exp(-schedule.lam(ends) / 7)
    return _pinned(schedule.inverse(-7 * _between(ratio, steps).log()), ends)


def noise_levels(schedule: Schedule, levels: Tensor) -> Tensor:
    """Times at which sigma/alpha takes the given falling levels; levels [K+1] -> times [K+1]."""
    return schedule.inverse(-torch.as_tensor(levels, dtype=torch.float64).log())


def _between(ends: Tensor, steps: int) -> Tensor:
    return torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64)


def _pinned(times: Tensor, ends: Tensor) -> Tensor:
    """The same times with exact ends, which a round trip through lambda leaves a few ulp off."""
    return torch.cat([ends[:1], times[1:-1], ends[1:]])
