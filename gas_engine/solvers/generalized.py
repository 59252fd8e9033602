"""The Generalized Solver (arXiv 2510.17699): a few hundred scalars around DPM-Solver++ theory -> a tableau.

Shape legend: K steps; lag 0 is the newest evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..schedule import Schedule
from ..tableau import Tableau
from ._theory import Steps, band, checked_times, dpmpp_terms
from .grids import grid

MAX_STEPS = 32
BASES = ("dpmpp3m",)
FORMS = ("theory", "s4s", "linear")
_LOGIT_MARGIN = 1e-5


class GeneralizedSolver(nn.Module):
    """Learned times (theta), coefficients (phi_a, phi_c) and told-time offsets (xi) of a K-step multistep solver.

    Step n uses order min(n+1, order). With ``theory`` (default) the coefficients are additive corrections, initially
    zero, to DPM-Solver++ (section 3 of the paper)::

        x+ = (r + a_1) x - (alpha phi1 + c_1) m_0 + (alpha phi2 + c_2) D1 - (alpha phi3 + c_3) D2
             + sum_{i>=4} c_i m_{i-1} + sum_{i>=2} a_i x_{n-i+1}            (order >= 3; r = sigma+/sigma)

    ``theory=False`` is the S4S form of the paper's Table 3, ``x+ = r y + C sum a_i m_{i-1}`` with
    ``y = r x + C sum c_i m_{i-1}``, ``C = -alpha phi1``; ``theory="linear"`` the plain linear multistep form
    ``x+ = sum a_i x_{n-i+1} + sum c_i m_{i-1}``. Both start at the DPM-Solver++ weights.

    Parameters, all float64 on the CPU: ``theta`` [K-1] (logits of stick breaking; the first belongs to the time
    nearest t_eps), ``xi`` [K], ``phi_a`` and ``phi_c`` [K, order] (second index: lag, 0 = newest).

    ``start`` gives other initial times than the uniform grid: a grid's name or K+1 falling times. Raises ValueError
    for K outside 1..32, an order outside 1..K, an unknown base, or times that do not fall from t_start to t_eps.

        solver = GeneralizedSolver(steps=4, schedule=denoiser.schedule, t_eps=1e-3)
        x = rollout(denoiser, noise, solver.tableau(denoiser.prediction))
    """

    def __init__(
        self,
        steps: int,
        schedule: Schedule,
        t_eps: float = 1e-3,
        order: int | None = None,
        base: str = "dpmpp3m",
        theory: bool | str = True,
        start: str | Tensor = "uniform",
    ) -> None:
        super().__init__()
        order = steps if order is None else order
        form = {True: "theory", False: "s4s"}.get(theory, theory) if isinstance(theory, bool) else theory
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"steps must be between 1 and {MAX_STEPS}, got {steps}")
        if not 1 <= order <= steps:
            raise ValueError(f"order must be between 1 and steps = {steps}, got {order}")
        if base not in BASES:
            raise ValueError(f"unknown base solver {base!r}; known: {', '.join(BASES)}")
        if form not in FORMS:
            raise ValueError(f"theory must be True, False or 'linear', got {theory!r}")
        self.steps, self.order, self.base, self.form = steps, order, base, str(form)
        self.schedule, self.t_eps = schedule, float(t_eps)
        self.facts: dict[str, Any] = {}  # what a solver file said about itself
        self.orders = torch.arange(1, steps + 1).clamp(max=order)
        # Lag i exists where i earlier evaluations do. c_i corrects the gain of its own term: of -m_0, of -D10
        # (order 2) or +D1 (order 3), of -D2; from lag 3 on, of m_{i-1}.
        self._used = (torch.arange(order) < self.orders[:, None]).to(torch.float64)
        self._sign = self._used.clone()
        self._sign[:, [i for i in (0, 2) if i < order]] *= -1
        if order > 1:
            self._sign[self.orders == 2, 1] *= -1
        times = grid(start, schedule, steps, t_eps) if isinstance(start, str) else checked_times(schedule, start)
        self.theta = nn.Parameter(self._theta_of(times))
        self.xi = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
        a, c = self._start_coefficients(times)
        self.phi_a, self.phi_c = nn.Parameter(a), nn.Parameter(c)

    @property
    def theory(self) -> bool | str:
        """The constructor's argument: True, False or "linear"."""
        return {"theory": True, "s4s": False}.get(self.form, self.form)

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

    def tableau(self, prediction: str = "data") -> Tableau:
        """The tableau for a network of the given prediction type; about K^2 numbers, vectorised, differentiable."""
        times = self.times()
        ratio, gains, differences = dpmpp_terms(Steps.of(self.schedule, times), self.orders)
        a, b = getattr(self, f"_{self.form}")(ratio, gains, differences)
        solver = Tableau(
            a, b, self.told_times(times), prediction="data", nodes=times, schedule=self.schedule,
            name=f"generalized solver ({self.form})",
        )  # fmt: skip
        return solver.fold(prediction)

    def _theory(self, ratio: Tensor, gains: Tensor, differences: Tensor) -> tuple[Tensor, Tensor]:
        a, c = self.phi_a * self._used, self.phi_c * self._sign
        x_lags = torch.cat([(ratio + a[:, 0])[:, None], a[:, 1:]], 1)
        head = min(3, self.order)
        m_lags = ((gains[:, :head] + c[:, :head])[:, :, None] * differences[:, :head]).sum(1)
        return band(x_lags), band(torch.cat([m_lags, c[:, 3:]], 1))

    def _s4s(self, ratio: Tensor, gains: Tensor, differences: Tensor) -> tuple[Tensor, Tensor]:
        lags = gains[:, :1] * (ratio[:, None] * self.phi_c + self.phi_a) * self._used
        return torch.diag(ratio.square()), band(lags)

    def _linear(self, ratio: Tensor, gains: Tensor, differences: Tensor) -> tuple[Tensor, Tensor]:
        return band(self.phi_a * self._used), band(self.phi_c * self._used)

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

    def _start_coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.zeros(self.steps, self.order, dtype=torch.float64)
        c = torch.zeros_like(a)
        if self.form == "theory":
            return a, c
        ratio, gains, differences = dpmpp_terms(Steps.of(self.schedule, times), self.orders)
        lags = (gains[:, :, None] * differences).sum(1)
        head = min(3, self.order)
        c[:, :head] = lags[:, :head]
        if self.form == "s4s":
            return a, c / gains[:, :1]
        a[:, 0] = ratio
        return a, c

    def extra_repr(self) -> str:
        return f"steps={self.steps}, order={self.order}, form={self.form}, schedule={self.schedule}, t_eps={self.t_eps}"


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
