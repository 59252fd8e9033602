"""A reversible two-state student: every state can be walked back to from the two that follow it.

Shape legend: K steps. Bidirectional explicit linear multistep methods: arXiv 2410.07273.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..schedule import Schedule
from ..tableau import Tableau
from ._theory import Steps
from ._times import LearnedTimes

A_MIN = 1e-2


class BELMSolver(LearnedTimes):
    """A band of two: x[n+1] = A[n,n-1] x[n-1] + A[n,n] x[n] + B[n,n] F[n], second order, A[n,n-1] > 0.01.

    With q = h[n+1] / h[n], the ratio of steps in lambda, and data estimates m::

        a       = q^2 sigma[n+1] / sigma[n-1] exp(phi_r[n])                      A[n,n-1] = sqrt(a^2 + A_MIN^2)
        A[n,n]  = (sigma[n+1] - A[n,n-1] sigma[n-1]) / sigma[n] + phi_a[n]
        B[n,n]  = alpha[n+1] - A[n,n-1] alpha[n-1] - A[n,n] alpha[n] + phi_c[n]

    and an Euler step first. At phi = 0 the last two lines are exact for a constant data estimate, whatever A[n,n-1]
    is, and the first one makes the method second order. Explicitly invertible in x[n-1], so that
    ``MemoryPolicy(trajectory="reversible")`` needs two states where a dense solver needs K+1.

    Parameters, float64 on the CPU: ``theta`` [K-1] and ``xi`` [K] as in ``GeneralizedSolver``; ``phi_r``, ``phi_a``,
    ``phi_c`` [K], initially zero (the first phi_r has no effect). Raises ValueError as ``GeneralizedSolver`` does.

        solver = BELMSolver(steps=6, schedule=denoiser.schedule)
        x = rollout(denoiser, noise, solver.tableau(denoiser.prediction), memory=MemoryPolicy(trajectory="reversible"))
    """

    family = "belm"

    def __init__(self, steps: int, schedule: Schedule, t_eps: float = 1e-3, start: str | Tensor = "uniform") -> None:
        super().__init__(steps, schedule, t_eps, start)
        self.phi_r, self.phi_a, self.phi_c = (nn.Parameter(torch.zeros(steps, dtype=torch.float64)) for _ in range(3))

    def tableau(self, prediction: str = "data") -> Tableau:
        """The tableau for a network of the given prediction type, differentiable; 5K-1 parameters."""
        times = self.times()
        s = Steps.of(self.schedule, times)
        theory = (s.h[1:] / s.h[:-1]).square() * s.sigma_next[1:] / s.sigma[:-1]
        below = torch.sqrt((theory * self.phi_r[1:].exp()).square() + A_MIN**2)
        # What the older state brings of noise and data; none at the first step.
        noise, data = (torch.cat([v.new_zeros(1), below * v[:-1]]) for v in (s.sigma, s.alpha))
        a = (s.sigma_next - noise) / s.sigma + self.phi_a
        b = s.alpha_next - data - a * s.alpha + self.phi_c
        solver = Tableau(
            torch.diag(a) + torch.diag(below, -1), torch.diag(b), self.told_times(times), prediction="data",
            nodes=times, schedule=self.schedule, name="bidirectional linear multistep solver",
        )  # fmt: skip
        return solver.fold(prediction)

    def bits_lost(self) -> Tensor:
        """Bits that an uncoded walk back would lose by each step, log2 1 / |A[n,n-1]| where positive, [K-1]."""
        return -self.tableau().A.detach().diagonal(-1).abs().log2().clamp(max=0)
