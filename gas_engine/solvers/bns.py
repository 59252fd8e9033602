"""Bespoke non-stationary solvers (arXiv 2403.01329): every number of the tableau is free.

Shape legend: K steps; V[j] the velocity estimated by evaluation j.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..schedule import Schedule
from ..tableau import Tableau
from ._theory import packed, triangle
from ._times import LearnedTimes
from .named import MAKERS, checked_name


class BNSSolver(LearnedTimes):
    """The non-stationary step, one weight of the first state and a dense triangle of velocities::

        x[n+1] = a[n] x[0] + sum_{j<=n} b[n,j] V[j]

    which says all that a row over every earlier state could (arXiv 2403.01329, section 3): those are sums of the same
    terms. V is the velocity of the flow, e - m, or for the variance preserving schedules alpha e - sigma m, the
    velocity in their angle. The coefficients do not hang on the times, which say where the network is asked. Starts at
    the tableau of ``base``, any classical solver by name, written in these terms.

    Parameters, float64 on the CPU: ``theta`` [K-1] as in ``GeneralizedSolver``, ``a`` [K], ``b`` [K (K+1) / 2] row by
    row; ``xi`` [K], never trained: a node's time is nothing but the time it tells. Raises ValueError as
    ``GeneralizedSolver`` does.

        solver = BNSSolver(steps=6, schedule=denoiser.schedule, base="dpmpp2m", start="quadratic")
        x = rollout(denoiser, noise, solver.tableau(denoiser.prediction))
    """

    family = "bns"
    settings = ("base",)

    def __init__(
        self, steps: int, schedule: Schedule, t_eps: float = 1e-3, base: str = "dpmpp3m",
        start: str | Tensor = "uniform",
    ) -> None:  # fmt: skip
        super().__init__(steps, schedule, t_eps, start)
        self.base = checked_name(base, base=True)
        self.of = "flow" if schedule.kind == "flow" else "velocity"
        begin = MAKERS[self.base](schedule, self.times().detach()).fold(self.of)
        # x[1..K] = A[:, 0] x[0] + older x[1..K] + B V, solved for x[1..K].
        older = torch.zeros_like(begin.A)
        older[:, :-1] = begin.A[:, 1:]
        right = torch.cat([begin.A[:, :1], begin.B], 1)
        solved = torch.linalg.solve_triangular(torch.eye(steps, dtype=torch.float64) - older, right, upper=False)
        self.a, self.b = nn.Parameter(solved[:, 0].clone()), nn.Parameter(packed(solved[:, 1:]))

    def trained(self, step: int) -> Collection[str]:
        return ["theta", "a", "b"]

    def tableau(self, prediction: str = "data") -> Tableau:
        """The tableau for a network of the given prediction type, differentiable."""
        times = self.times()
        first = torch.cat([self.a[:, None], self.a.new_zeros(self.steps, self.steps - 1)], 1)
        solver = Tableau(
            first, triangle(self.b, self.steps), times[:-1], prediction=self.of, nodes=times, schedule=self.schedule,
            name=f"bns from {self.base}",
        )  # fmt: skip
        return solver.fold(prediction)
