"""One parameter set for a range of K, of guidance scales, or of both: the Generalized Solver with tables that are
polynomials in K, position and lag, and in the logarithm of the scale.

Shape legend: K steps; position n / (K-1) of a step n; lag 0 is the newest evaluation; P terms, S scales.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import SCALES, Range, nodes
from ..schedule import Schedule
from ..tableau import Tableau
from ._times import MAX_STEPS, LearnedTimes
from .generalized import GeneralizedSolver

MAX_DEGREE = 12  # beyond it a solver has thousands of numbers
MAX_SCALES = 8


class AnyStepsSolver(LearnedTimes):
    """A Generalized Solver (arXiv 2510.17699) for every K of a range, or every scale of guidance, from one set of
    numbers.

    Each of its tables (theta, xi, phi_a, phi_c) is a polynomial over the points (K, position, lag) that exist::

        table(K, n, lag) = start(K, n) + sum_q w_q q(K, n, lag)

    with polynomials q orthonormal over the points of the whole range, so that w = 0 is DPM-Solver++(3M), or another
    ``base``, on the start grid at every K. ``degree`` bounds their total degree, and says how much the K share: where
    it is low, tables vary slowly with K; at the largest K less one there are as many polynomials as points, every K can
    have any table, and one file costs none of them accuracy. Unless given it is that, at most 12.

    With a range of ``guidance`` scales g each w_q is a polynomial in s = log(1 + g), by Lagrange's formula through
    ``scales`` of them, g_j, which are the ends of the range and Chebyshev points between::

        w_q(g) = sum_j w_qj prod_{i != j} (s - s_i) / (s_j - s_i)

    Each g_j can have any tables, and no update of one moves those of another.

    ``at(steps, guidance)`` is the solver of one K and one scale, differentiable in w. What knows of one alone
    (``steps``, ``times``, ``tableau``) sees the largest K and the middle of the scales. Parameters, float64 on the CPU:
    w of ``theta``, ``xi``, ``phi_a``, ``phi_c``, [P] or [P, S]; 511 numbers for K = 4 to 10, 159 for K = 6 over a range
    of guidance. Raises ValueError for K beyond 2..32, a degree beyond 0..12, or scales beyond 2..8.

        solver = AnyStepsSolver(range(4, 11), denoiser.schedule)
        x = rollout(denoiser, noise, solver.at(6).tableau(denoiser.prediction))
        solver = AnyStepsSolver(range(6, 7), denoiser.schedule, guidance=(2.0, 9.0))
        x = rollout(guided(denoiser, 5.0, null), noise, solver.at(guidance=5.0).tableau(denoiser.prediction))
    """

    family = "any"
    settings = ("start", "base", "degree")

    def __init__(
        self, steps: range, schedule: Schedule, t_eps: float = 1e-3, start: str = "uniform",
        base: str = "dpmpp3m", degree: int | None = None, guidance: Range | None = None,
        scales: int = SCALES,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        if len(steps) == 0 or steps.step != 1 or not 2 <= steps[0] <= steps[-1] <= MAX_STEPS:
            raise ValueError(f"a range of steps must lie within 2 to {MAX_STEPS}, got {steps}")
        degree = min(steps[-1] - 1, MAX_DEGREE) if degree is None else degree
        if not 0 <= degree <= MAX_DEGREE:
            raise ValueError(f"degree must be between 0 and {MAX_DEGREE}, got {degree}")
        if not 2 <= scales <= MAX_SCALES:
            raise ValueError(f"the scales of a range must be between 2 and {MAX_SCALES}, got {scales}")
        if guidance is not None and not 0 <= guidance[0] < guidance[1] < math.inf:
            raise ValueError(f"a range of guidance must rise from 0 or more, got {guidance}")
        self._range, self.steps, self.schedule, self.t_eps = steps, steps[-1], schedule, float(t_eps)
        self.start, self.base, self.degree = start, base, degree
        self._guidance, self.scales = guidance, scales
        self.facts: dict[str, Any] = {}
        for name in TABLES:
            count = self._polynomials(name, steps[0]).shape[1]
            shape = (count,) if guidance is None else (count, scales)
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float64)))
        self.at(steps[0])  # refuses a start or a base that no K has

    @property
    def steps_range(self) -> range:
        return self._range

    @property
    def guidance_range(self) -> Range | None:
        return self._guidance

    def config(self) -> dict[str, Any]:
        found = super().config() | {"steps": [self._range[0], self._range[-1]]}
        if self._guidance is not None:
            found |= {"guidance": [*self._guidance], "guidance_scales": self.scales}
        return found

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AnyStepsSolver:
        (low, high), schedule = config["steps"], Schedule.from_config(config["schedule"])
        given = {name: config[name] for name in cls.settings}
        if "guidance_scales" in config:  # without it, guidance is but what the solver was trained at
            first, last = map(float, config["guidance"])
            given |= {"guidance": (first, last), "scales": config["guidance_scales"]}
        return cls(range(low, high + 1), schedule, config["t_eps"], **given)

    def at(self, steps: int | None = None, guidance: float | Range | None = None) -> LearnedTimes:
        """The solver of K = ``steps`` at a scale of guidance; its tables are buffers with a gradient.

        Raises ValueError for a K or a scale out of range.
        """
        steps = self.steps if steps is None else steps
        self.check_steps(steps)
        shares = self._shares(guidance)
        solver = GeneralizedSolver(steps, self.schedule, self.t_eps, base=self.base, start=self.start)
        for name in TABLES:
            start, w = getattr(solver, name).detach(), getattr(self, name)
            change = self._polynomials(name, steps) @ (w if shares is None else w @ shares)
            if start.ndim == 2:
                change = start.new_zeros(start.shape).index_put(tuple(torch.tril_indices(steps, steps)), change)
            delattr(solver, name)
            solver.register_buffer(name, start + change)
        solver.facts = {name: value for name, value in self.facts.items() if name not in self.config()}
        if "metrics" in solver.facts:
            solver.facts["metrics"] = solver.facts["metrics"].get("by_steps", {}).get(str(steps), {})
        if shares is not None and isinstance(guidance, int | float):
            solver.facts["guidance"] = float(guidance)
        return solver

    def span(self, steps: int, guidance: float | None) -> Tensor:
        shares = self._shares(guidance)
        rows = [self._polynomials(name, steps) for name in TABLES]
        if shares is not None:
            rows = [(row[:, :, None] * shares).flatten(1) for row in rows]
        return torch.block_diag(*(torch.linalg.qr(row.T)[0] for row in rows))

    def tableau(self, prediction: str = "data") -> Tableau:
        """That of the largest K, in the middle of the scales."""
        return self.at().tableau(prediction)

    def times(self) -> Tensor:
        """Those of the largest K, in the middle of the scales."""
        return self.at().times()

    def told_times(self, times: Tensor | None = None) -> Tensor:
        """Those of the largest K, in the middle of the scales."""
        return self.at().told_times(times)

    def _shares(self, guidance: float | Range | None) -> Tensor | None:
        """What each w_qj has in w_q at a scale, [S]; in the middle of the range where none is given."""
        if self._guidance is None:
            return None
        if guidance is not None:
            self.check_guidance(guidance)
        places = torch.tensor(nodes(self._guidance, self.scales), dtype=torch.float64).log1p()
        place = (
            (places[0] + places[-1]) / 2 if guidance is None else torch.tensor(guidance, dtype=torch.float64).log1p()
        )
        own = torch.eye(len(places), dtype=torch.bool)
        factors = (place - places) / (places[:, None] - places).masked_fill(own, 1.0)
        return factors.masked_fill(own, 1.0).prod(1)

    def _polynomials(self, name: str, steps: int) -> Tensor:
        low, high, less = self._range[0], self._range[-1], int(name == "theta")
        rows = polynomials(low - less, high - less, TABLES[name], self.degree)
        return rows[steps - less]

    def extra_repr(self) -> str:
        low, high = self._range[0], self._range[-1]
        told = "" if self._guidance is None else f"guidance={self._guidance}, scales={self.scales}, "
        return f"steps={low}-{high}, degree={self.degree}, {told}schedule={self.schedule}, t_eps={self.t_eps}"


# Dimensions of a table beside K: position, and lag.
TABLES = {"theta": 1, "xi": 1, "phi_a": 2, "phi_c": 2}


@lru_cache(maxsize=64)
def polynomials(low: int, high: int, dimensions: int, degree: int) -> dict[int, Tensor]:
    """For each K of ``low`` to ``high`` the polynomials at its points, [points, terms], orthonormal over all K.

    Points of K: n = 0..K-1 (one dimension), or n and lag = 0..n (two), row by row. Terms: total degree at most
    ``degree`` and below ``high``, degree in K below the number of K; with all of them the matrix of all K is square
    (on the largest K the points determine a polynomial of degree ``high`` - 1; what is left is divisible by
    (K - high), and so on). Chebyshev products in the order of their degree, orthonormalised by QR.
    """
    points = [
        (k, n, lag) for k in range(low, high + 1) for n in range(k) for lag in range(n + 1 if dimensions == 2 else 1)
    ]
    k, n, lag = torch.tensor(points, dtype=torch.float64).unbind(1)
    count, top = high - low + 1, min(degree, high - 1)
    spans = (count, top + 1, top + 1 if dimensions == 2 else 1)
    exponents = sorted((e for e in product(*map(range, spans)) if sum(e) <= top), key=lambda e: (sum(e), e))
    axes = (_unit(k, low, high), 2 * n / (k - 1).clamp(min=1) - 1, _unit(lag, 0, high - 1))
    chebyshev = [torch.cos(torch.arange(top + 1) * torch.acos(axis.clamp(-1, 1))[:, None]) for axis in axes]
    columns = [chebyshev[0][:, i] * chebyshev[1][:, j] * chebyshev[2][:, m] for i, j, m in exponents]
    q, r = torch.linalg.qr(torch.stack(columns, 1))
    q = q * r.diagonal().sign()
    sizes = [int((k == steps).sum()) for steps in range(low, high + 1)]
    return dict(zip(range(low, high + 1), q.split(sizes), strict=True))


def _unit(values: Tensor, low: float, high: float) -> Tensor:
    """From [low, high] to [-1, 1]."""
    return 2 * (values - low) / ((high - low) or 1) - 1
