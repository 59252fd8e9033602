"""Learned times: what every trained solver shares, whatever its coefficients are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import Range
from ..schedule import Schedule
from ..tableau import Tableau
from ._theory import checked_times
from .grids import grid

MAX_STEPS = 32
_LOGIT_MARGIN = 1e-5


class LearnedTimes(nn.Module):
    """Times of the states and of the network, as parameters: theta [K-1] and xi [K], float64 on the CPU.

    ``theta`` are logits of stick breaking between t_start and t_eps (the first belongs to the time nearest t_eps);
    the network is told t_n + xi_n (arXiv 2510.17699, section 3). A subclass adds its coefficients and ``tableau``,
    ``settings`` (arguments of its constructor that a file keeps, attributes of the same name) and, where not every
    update trains everything, ``trained``.
    """

    family = ""
    settings: tuple[str, ...] = ()

    def __init__(self, steps: int, schedule: Schedule, t_eps: float, start: str | Tensor) -> None:
        super().__init__()
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"steps must be between 1 and {MAX_STEPS}, got {steps}")
        self.steps, self.schedule, self.t_eps = steps, schedule, float(t_eps)
        self.facts: dict[str, Any] = {}  # what a solver file said about itself
        times = grid(start, schedule, steps, t_eps) if isinstance(start, str) else checked_times(schedule, start)
        self.theta = nn.Parameter(self._theta_of(times))
        self.xi = nn.Parameter(torch.zeros(steps, dtype=torch.float64))

    @property
    def steps_range(self) -> range:
        """The K that it has a tableau for: its own."""
        return range(self.steps, self.steps + 1)

    @property
    def guidance_range(self) -> Range | None:
        """The scales of guidance that its tableau is a function of; None where that is one and the same for all."""
        return None

    def at(self, steps: int | None = None, guidance: float | Range | None = None) -> LearnedTimes:
        """The solver of K = ``steps`` at a scale of guidance, which is itself.

        Raises ValueError for a K or a scale that it has no tableau for.
        """
        self.check_steps(self.steps if steps is None else steps)
        return self

    def each(self) -> list[LearnedTimes]:
        """The solvers of every K that it has a tableau for, fewest steps first."""
        return [self.at(steps) for steps in self.steps_range]

    def check_steps(self, steps: int | None) -> None:
        """Raises ValueError for a K that it has no tableau for, and for None where it has several to choose from."""
        known = self.steps_range
        several = f"{known[0]} to {known[-1]}" if len(known) > 1 else str(known[0])
        if steps is None and len(known) > 1:
            raise ValueError(f"a solver of {several} steps; say which with --steps")
        if steps is not None and steps not in known:
            raise ValueError(f"a solver of {several} steps, but --steps {steps} was given")

    def check_guidance(self, guidance: float | Range | None) -> None:
        """Raises ValueError for a scale that it has no tableau for, and for none or a range where it wants one."""
        if self.guidance_range is None:
            return
        low, high = self.guidance_range
        if not isinstance(guidance, int | float) or (guidance == 1.0 and low > 1.0):
            raise ValueError(f"a solver for guidance {low:g} to {high:g}; say which with --guidance")
        if not low <= guidance <= high:
            raise ValueError(f"a solver for guidance {low:g} to {high:g}, but --guidance {guidance:g} was given")

    def tableau(self, prediction: str = "data") -> Tableau:
        """The tableau for a network of the given prediction type."""
        raise NotImplementedError

    def trained(self, step: int) -> Collection[str]:
        """Names of the parameters that update ``step`` (from 0) moves; the others wait, with their moments."""
        return [name for name, _ in self.named_parameters()]

    def span(self, steps: int, guidance: float | None) -> Tensor | None:
        """Orthonormal directions of its parameters [n, k] that hold all gradients of one K and scale; None: all."""
        return None

    def config(self) -> dict[str, Any]:
        """What a solver file says, beside the parameters, to build the solver again."""
        schedule = self.schedule.config()
        given = {name: getattr(self, name) for name in self.settings}
        return {"family": self.family, "steps": self.steps, "schedule": schedule, "t_eps": self.t_eps, **given}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LearnedTimes:
        """Inverse of ``config``; KeyError for what is missing."""
        given = {name: config[name] for name in cls.settings}
        return cls(config["steps"], Schedule.from_config(config["schedule"]), config["t_eps"], start="uniform", **given)

    def extra_repr(self) -> str:
        given = "".join(f"{name}={getattr(self, name)}, " for name in self.settings)
        return f"steps={self.steps}, {given}schedule={self.schedule}, t_eps={self.t_eps}"

    def times(self) -> Tensor:
        """Times of the states x[0..K], [K+1], falling from t_start to t_eps, differentiable in theta."""
        fraction = torch.sigmoid(self.theta) * (1 - 2 * _LOGIT_MARGIN) + _LOGIT_MARGIN
        span = self.schedule.t_start - self.t_eps
        interior = (1 - torch.cumprod(fraction, 0)) * span + self.t_eps
        ends = interior.new_tensor([self.schedule.t_start, self.t_eps])
        return torch.cat([ends[:1], interior.flip(0), ends[1:]])

    def told_times(self, times: Tensor | None = None) -> Tensor:
        """Times that the network is told, t_n + xi_n, bent smoothly so that they stay in the schedule's domain, [K]."""
        times = self.times() if times is None else times
        low, high = self.schedule.domain
        margin_low, margin_high = (self.t_eps - low) / 2, 0.4 * (high - 1.0)
        return guard(times[:-1] + self.xi, low, high, margin_low, margin_high)

    def _theta_of(self, times: Tensor) -> Tensor:
        """Exact inverse of ``times``: theta_i = logit of the ratio of successive remaining lengths."""
        ends = times.new_tensor([self.schedule.t_start, self.t_eps])
        if len(times) != self.steps + 1 or not torch.allclose(times[[0, -1]], ends, rtol=1e-9, atol=1e-12):
            raise ValueError(
                f"the start times must be {self.steps + 1}, from {float(ends[0]):.6g} to {self.t_eps:.6g}, "
                f"got {[round(float(t), 6) for t in times]}"
            )
        remaining = 1 - (times.flip(0)[:-1] - self.t_eps) / (self.schedule.t_start - self.t_eps)
        fraction = (remaining[1:] / remaining[:-1] - _LOGIT_MARGIN) / (1 - 2 * _LOGIT_MARGIN)
        if not bool(((fraction > 0) & (fraction < 1)).all()):
            raise ValueError(f"the start times lie too close together: {[round(float(t), 8) for t in times]}")
        return torch.logit(fraction)


def guard(t: Tensor, low: float, high: float, margin_low: float, margin_high: float) -> Tensor:
    """t itself well inside (low, high); within a margin of an end it approaches that end and never reaches it.

    ``high - d^2 / (d + u)`` for a time u beyond ``high - d``, alike below: continuous with its derivative, exactly the
    identity inside, and its slope falls only as 1/u^2, so a time that wandered out can still be learned back.
    """
    floor, ceiling = low + margin_low, high - margin_high
    seen = t.detach()
    if bool(((seen >= floor) & (seen <= ceiling)).all()):
        return t
    under = low + margin_low**2 / (margin_low + (floor - t).clamp(min=0))
    over = high - margin_high**2 / (margin_high + (t - ceiling).clamp(min=0))
    return torch.where(t < floor, under, torch.where(t > ceiling, over, t))
