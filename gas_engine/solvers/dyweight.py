"""A solver like DyWeight (arXiv 2603.11607): free weights of past gradients, which set the step's length as well.

Shape legend: K steps; D[j] the gradient estimated by evaluation j.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..schedule import Schedule
from ..tableau import Tableau
from ._theory import packed, triangle
from ._times import LearnedTimes
from .classical import adams_bashforth


class DyWeightSolver(LearnedTimes):
    """Time-varying weights of past gradients, bound to no sum, and learned times::

        z[n+1] = z[n] + (u[n+1] - u[n]) sum_{j<=n} w[n,j] D[j]

    with z = x / alpha, u = sigma / alpha, D = e for variance preserving schedules (EDM's form of the equation) and
    z = x, u = sigma, D = e - m for rectified flow. Where a row of w sums to s, the step is s times as long as its
    times say: so weights calibrate times, and the network is told the nodes, without offsets. Starts at the
    Adams-Bashforth weights of order 4, which is iPNDM. Built from what the paper's abstract says (unconstrained,
    time-varying, coupled to the effective step); whether its times are parametrised in this way is not known here.

    Parameters, float64 on the CPU: ``theta`` [K-1] as in ``GeneralizedSolver``, ``weights`` [K (K+1) / 2] row by row;
    ``xi`` [K], never trained. Raises ValueError as ``GeneralizedSolver`` does.

        solver = DyWeightSolver(steps=6, schedule=denoiser.schedule, start="quadratic")
        x = rollout(denoiser, noise, solver.tableau(denoiser.prediction))
    """

    family = "dyweight"

    def __init__(self, steps: int, schedule: Schedule, t_eps: float = 1e-3, start: str | Tensor = "uniform") -> None:
        super().__init__(steps, schedule, t_eps, start)
        orders = [min(n + 1, 4) for n in range(steps)]
        self.weights = nn.Parameter(packed(adams_bashforth(orders)))

    def trained(self, step: int) -> Collection[str]:
        return ["theta", "weights"]

    def tableau(self, prediction: str = "data") -> Tableau:
        """The tableau for a network of the given prediction type, differentiable."""
        times = self.times()
        alpha, sigma, _ = self.schedule(times)
        flow = self.schedule.kind == "flow"
        scale, u = (torch.ones_like(alpha), sigma) if flow else (alpha, sigma / alpha)
        gain = scale[1:] * (u[1:] - u[:-1])
        solver = Tableau(
            torch.diag(scale[1:] / scale[:-1]), gain[:, None] * triangle(self.weights, self.steps), times[:-1],
            prediction="flow" if flow else "noise", nodes=times, schedule=self.schedule, name="dyweight",
        )  # fmt: skip
        return solver.fold(prediction)
