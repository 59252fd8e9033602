"""Noise schedules: t -> (alpha, sigma, lambda), pure and in float64.

A noised sample is ``x_t = alpha(t) x_0 + sigma(t) noise`` and ``lambda = log alpha - log sigma`` (half the log
signal-to-noise ratio). Times run from ``t_start`` (noise) down to a small ``t_eps`` (data).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# A learned offset may push a told time a little beyond t = 1, where every schedule is still smooth.
_BEYOND_START = 0.25
# Rectified flow has alpha(1) = 0, hence lambda = -inf: its solvers start this much below one.
_FLOW_MARGIN = 1e-6


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule, built by ``vp_linear``, ``vp_discrete``, ``edm`` or ``flow``.

    All methods take a time (or lambda) as a float or a tensor of any shape and device, compute in float64, return
    float64 of the same shape and are differentiable. ``domain`` is the open interval of times a network may be told;
    ``t_start`` is where sampling begins. Two schedules are equal if they have the same kind and numbers.

        schedule = Schedule.vp_linear(0.1, 20.0)
        alpha, sigma, lam = schedule(0.5)
        t = schedule.inverse(lam)
    """

    kind: str
    parameters: Mapping[str, Any]
    t_start: float = 1.0
    domain: tuple[float, float] = (0.0, 1.0 + _BEYOND_START)
    _knots: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def vp_linear(cls, beta_0: float = 0.1, beta_1: float = 20.0) -> Schedule:
        """Variance preserving with a linear beta: ``log alpha = -t^2 (beta_1 - beta_0) / 4 - t beta_0 / 2``.

        Song et al. (arXiv 2011.13456), equation 33. Raises ValueError unless ``0 < beta_0 < beta_1``.
        """
        if not 0 < beta_0 < beta_1 < math.inf:
            raise ValueError(f"vp_linear needs 0 < beta_0 < beta_1, got beta_0={beta_0}, beta_1={beta_1}")
        return cls("vp_linear", {"beta_0": float(beta_0), "beta_1": float(beta_1)})

    @classmethod
    def vp_discrete(cls, alphas_cumprod: Tensor | Sequence[float]) -> Schedule:
        """Piecewise-linear ``log alpha`` through ``(n/N, log(alphas_cumprod[n-1]) / 2)``, n = 1..N.

        The end segments extend beyond both ends; the network's label is ``(t - 1/N) * 1000``. Raises ValueError
        unless the N >= 2 values fall strictly and lie in (0, 1).
        """
        values = _float64(alphas_cumprod).detach().cpu()
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"alphas_cumprod must be one row of at least 2 values, got shape {tuple(values.shape)}")
        falls = bool((values[1:] < values[:-1]).all()) and float(values[-1]) > 0 and float(values[0]) < 1
        if not falls:
            raise ValueError("alphas_cumprod must fall strictly from below 1 to above 0")
        log_alpha = values.log() / 2
        grid = torch.linspace(0, 1, len(values) + 1, dtype=torch.float64)[1:]
        slope = (log_alpha[1] - log_alpha[0]) / (grid[1] - grid[0])
        # Extrapolated towards zero, log alpha reaches 0 (no noise at all) here; times below mean nothing.
        lowest = max(0.0, float(grid[0] - log_alpha[0] / slope))
        schedule = cls("vp_discrete", {"alphas_cumprod": tuple(values.tolist())}, domain=(lowest, 1.0 + _BEYOND_START))
        schedule._knots[torch.device("cpu")] = (grid, log_alpha)
        return schedule

    @classmethod
    def edm(cls, t_eps: float = 1e-3, sigma_min: float = 0.0, sigma_max: float = math.inf) -> Schedule:
        """The linear VP schedule whose noise-to-signal ratio spans an EDM network's range between t_eps and 1.

        A network that was trained on ``sigma_min..sigma_max`` sees ``x / alpha(t)`` at level ``sigma(t) / alpha(t)``,
        which runs over what that range shares with the standard VP schedule (beta_d = 19.9, beta_min = 0.1).
        """
        if not 0 < t_eps < 1:
            raise ValueError(f"t_eps must lie between 0 and 1, got {t_eps}")
        beta_d, beta_min = 19.9, 0.1
        low = max(math.sqrt(math.expm1(beta_d * t_eps**2 / 2 + beta_min * t_eps)), float(sigma_min))
        high = min(math.sqrt(math.expm1(beta_d / 2 + beta_min)), float(sigma_max))
        if not low < high:
            raise ValueError(f"the noise range sigma_min={sigma_min}, sigma_max={sigma_max} leaves nothing to sample")
        growth_low, growth_high = math.log1p(low**2), math.log1p(high**2)
        beta_d = 2 * (growth_low / t_eps - growth_high) / (t_eps - 1)
        beta_min = growth_high - beta_d / 2
        return cls.vp_linear(beta_min, beta_min + beta_d)

    @classmethod
    def flow(cls, shift: float = 1.0) -> Schedule:
        """Rectified flow: ``sigma = shift t / (1 + (shift - 1) t)``, ``alpha = 1 - sigma`` (arXiv 2403.03206, eq. 23).

        The network's label is ``1000 sigma(t)``. Sampling starts 1e-6 below one, where lambda is finite.
        """
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be positive, got {shift}")
        # For shift < 1 the map has its pole above t = 1; stay half-way to it.
        beyond = _BEYOND_START if shift >= 1 else min(_BEYOND_START, 0.5 * shift / (1 - shift))
        return cls("flow", {"shift": float(shift)}, t_start=1.0 - _FLOW_MARGIN, domain=(0.0, 1.0 + beyond))

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return (alpha, sigma, lambda) at t, with log alpha evaluated once."""
        if self.kind == "flow":
            return self.alpha(t), self.sigma(t), self.lam(t)
        log_alpha = self.log_alpha(t)
        variance = -torch.expm1(2 * log_alpha)
        return log_alpha.exp(), variance.sqrt(), log_alpha - variance.log() / 2

    def log_alpha(self, t: Tensor | float) -> Tensor:
        """log alpha(t); for flow it is finite below t = 1 only."""
        t = _float64(t)
        if self.kind == "vp_linear":
            beta_0, beta_1 = self.parameters["beta_0"], self.parameters["beta_1"]
            return t * (t * ((beta_0 - beta_1) / 4) - beta_0 / 2)
        if self.kind == "vp_discrete":
            return _interpolate(t, *self._knots_on(t.device))
        return torch.log1p(-self.sigma(t))

    def alpha(self, t: Tensor | float) -> Tensor:
        """Signal level alpha(t)."""
        return 1 - self.sigma(t) if self.kind == "flow" else self.log_alpha(t).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise level sigma(t); for variance preserving ``sqrt(-expm1(2 log alpha))``, which keeps all its digits."""
        t = _float64(t)
        if self.kind == "flow":
            shift = self.parameters["shift"]
            return shift * t / (1 + (shift - 1) * t)
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def lam(self, t: Tensor | float) -> Tensor:
        """Half the log signal-to-noise ratio, ``log alpha - log sigma``."""
        log_alpha = self.log_alpha(t)
        if self.kind == "flow":
            return log_alpha - self.sigma(t).log()
        return log_alpha - torch.log(-torch.expm1(2 * log_alpha)) / 2

    def inverse(self, lam: Tensor | float) -> Tensor:
        """The time t at which ``lam(t)`` has the given value."""
        lam = _float64(lam)
        if self.kind == "flow":
            shift, sigma = self.parameters["shift"], torch.sigmoid(-lam)
            return sigma / (shift - (shift - 1) * sigma)
        # log(exp(-2 lambda) + 1) = -2 log alpha
        growth = torch.logaddexp(-2 * lam, torch.zeros_like(lam))
        if self.kind == "vp_linear":
            beta_0, beta_1 = self.parameters["beta_0"], self.parameters["beta_1"]
            w = 2 * (beta_1 - beta_0) * growth
            return w / ((torch.sqrt(beta_0**2 + w) + beta_0) * (beta_1 - beta_0))
        grid, log_alpha = self._knots_on(lam.device)
        return _interpolate(-growth / 2, log_alpha.flip(0), grid.flip(0))

    def config(self) -> dict[str, Any]:
        """Numbers from which ``from_config`` rebuilds the schedule; plain JSON."""
        return {"kind": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in self.parameters.items()}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Inverse of ``config``. Raises ValueError for an unknown kind or wrong numbers."""
        makers: dict[Any, Callable[..., Schedule]] = {
            "vp_linear": cls.vp_linear,
            "vp_discrete": cls.vp_discrete,
            "flow": cls.flow,
        }
        numbers = {name: value for name, value in config.items() if name != "kind"}
        if config.get("kind") not in makers:
            raise ValueError(f"unknown schedule kind {config.get('kind')!r}; known: {', '.join(makers)}")
        try:
            return makers[config["kind"]](**numbers)
        except TypeError as error:
            raise ValueError(f"the schedule does not take these numbers: {error}") from None

    def _knots_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._knots:
            grid, log_alpha = self._knots[torch.device("cpu")]
            self._knots[device] = (grid.to(device), log_alpha.to(device))
        return self._knots[device]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.parameters.items())))

    def __repr__(self) -> str:
        if self.kind == "vp_discrete":
            return f"Schedule.vp_discrete({len(self.parameters['alphas_cumprod'])} steps)"
        return f"Schedule.{self.kind}({', '.join(f'{k}={v:.6g}' for k, v in self.parameters.items())})"


def _float64(value: Tensor | Sequence[float] | float) -> Tensor:
    return value.to(torch.float64) if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise-linear interpolation through ascending knots (xs, ys), extended by the end segments."""
    upper = torch.searchsorted(xs, x.detach().contiguous()).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs.take(upper - 1), xs.take(upper), ys.take(upper - 1), ys.take(upper)  # xs[upper] would wait
    return y0 + (x - x0) * ((y1 - y0) / (x1 - x0))
