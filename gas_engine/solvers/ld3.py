"""LD3 (arXiv 2405.15506): a classical solver at learned times."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..schedule import Schedule
from ..tableau import Tableau
from ._times import LearnedTimes
from .named import MAKERS, checked_name


class LD3Solver(LearnedTimes):
    """The tableau of a classical solver, ``base`` by name, at learned times; the network is told t_n + xi_n.

    No coefficient is learned: all follow from the times (arXiv 2405.15506, section 4). Of the paper's method this is
    the solver; its relaxed objective is not built. Parameters, float64 on the CPU: ``theta`` [K-1] and ``xi`` [K] as in
    ``GeneralizedSolver``, which also says what raises ValueError; 2K-1 numbers.

        solver = LD3Solver(steps=6, schedule=denoiser.schedule, base="unipc3-bh1", start="quadratic")
        x = rollout(denoiser, noise, solver.tableau(denoiser.prediction))
    """

    family = "ld3"
    settings = ("base",)

    def __init__(
        self, steps: int, schedule: Schedule, t_eps: float = 1e-3, base: str = "dpmpp3m",
        start: str | Tensor = "uniform",
    ) -> None:  # fmt: skip
        super().__init__(steps, schedule, t_eps, start)
        self.base = checked_name(base, base=True)

    def tableau(self, prediction: str = "data") -> Tableau:
        """The tableau for a network of the given prediction type, differentiable."""
        times = self.times()
        base = MAKERS[self.base](self.schedule, times)
        return replace(base, t_net=self.told_times(times), name=f"ld3 with {self.base}").fold(prediction)
