"""Grids of times for solvers: K+1 times, from ``t_start`` (noise) down to ``t_eps`` (data)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import Schedule

GRIDS = ("logSNR", "uniform", "quadratic", "karras")
# Noise levels sigma/alpha that GITS (arXiv 2405.11326) found for Stable Diffusion 1.5, by the number of steps: the
# times of the teacher of arXiv 2510.17699 there.
GITS = {
    5: (14.6146, 4.39, 1.5286, 0.6526, 0.2667, 0.0292),
    6: (14.6146, 4.7242, 1.9132, 0.9324, 0.4557, 0.1801, 0.0292),
    7: (14.6146, 6.4477, 2.2797, 1.1629, 0.6114, 0.3058, 0.1258, 0.0292),
    8: (14.6146, 6.4477, 2.7391, 1.4467, 0.8319, 0.4936, 0.2667, 0.1258, 0.0292),
}


def grid(kind: str, schedule: Schedule, steps: int, t_eps: float = 1e-3) -> Tensor:
    """K+1 falling times of the named grid, float64.

    "logSNR": even in lambda; "uniform": even in t; "quadratic": even in sqrt(t); "karras": even in
    (sigma/alpha)^(1/7) (arXiv 2206.00364, equation 5); "gits": the noise levels of ``GITS``, whatever t_eps. Raises
    ValueError for an unknown name, steps < 1 or without GITS levels, or a t_eps outside the schedule.

        times = grid("quadratic", schedule, steps=6, t_eps=1e-3)
    """
    if kind not in (*GRIDS, "gits"):
        raise ValueError(f"unknown grid {kind!r}; known: {', '.join(GRIDS)}, gits")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if kind == "gits":
        if steps not in GITS:
            raise ValueError(f"the gits grid is of {', '.join(map(str, GITS))} steps, got {steps}")
        return noise_levels(schedule, torch.tensor(GITS[steps], dtype=torch.float64))
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
