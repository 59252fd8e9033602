"""S4S (arXiv 2502.17423): the weights of a linear multistep solver, without theory, on times of its own or given ones.

Shape legend: K steps; S[j] the estimate of evaluation j, of data or noise as the base solver has it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..schedule import Schedule
from ..tableau import Tableau
from ._theory import Steps, euler_terms, packed, triangle
from ._times import LearnedTimes
from .named import MAKERS, checked_name

TURN = 10


class S4SSolver(LearnedTimes):
    """The weights w of the linear multistep step, all free, at times that stay what they are::

        x[n+1] = r[n] x[n] + C[n] sum_{j<=n} w[n,j] S[j]

    with the exponential Euler step's r and C: sigma+/sigma and -alpha+ expm1(-h) for data estimates, alpha+/alpha and
    -sigma+ expm1(h) for noise estimates (arXiv 2502.17423, section 3). Starts at the weights of ``base``, a classical
    solver by name (UniPC's corrector is weights too). Of the paper's method this is the solver; its relaxed objective
    is not built.

    Parameters, float64 on the CPU: ``weights`` [K (K+1) / 2], row by row; ``theta`` [K-1] and ``xi`` [K] as in
    ``GeneralizedSolver``, never trained. Raises ValueError as ``GeneralizedSolver`` does.

        solver = S4SSolver(steps=6, schedule=denoiser.schedule, base="ipndm4", start="quadratic")
        x = rollout(denoiser, noise, solver.tableau(denoiser.prediction))
    """

    family = "s4s"
    settings: tuple[str, ...] = ("base",)

    def __init__(
        self, steps: int, schedule: Schedule, t_eps: float = 1e-3, base: str = "dpmpp3m",
        start: str | Tensor = "uniform",
    ) -> None:  # fmt: skip
        super().__init__(steps, schedule, t_eps, start)
        self.base = checked_name(base, base=True)
        times = self.times().detach()
        begin = MAKERS[self.base](schedule, times)
        self.of = str(begin.prediction)
        _, gain = euler_terms(Steps.of(schedule, times), self.of)
        self.weights = nn.Parameter(packed(begin.B / gain[:, None]))

    def trained(self, step: int) -> Collection[str]:
        return ["weights"]

    def tableau(self, prediction: str = "data") -> Tableau:
        """The tableau for a network of the given prediction type, differentiable."""
        times = self.times()
        ratio, gain = euler_terms(Steps.of(self.schedule, times), self.of)
        solver = Tableau(
            torch.diag(ratio), gain[:, None] * triangle(self.weights, self.steps), self.told_times(times),
            prediction=self.of, nodes=times, schedule=self.schedule, name=f"{self.family} from {self.base}",
        )  # fmt: skip
        return solver.fold(prediction)


class AlternatingS4SSolver(S4SSolver):
    """S4S-Alt (arXiv 2502.17423, section 4): the same, its weights and its times (theta, xi) trained in turn.

    ``TURN`` updates move the weights, the next ``TURN`` the times, and so on.
    """

    family = "s4s-alt"

    def trained(self, step: int) -> Collection[str]:
        return ["theta", "xi"] if step // TURN % 2 else ["weights"]
