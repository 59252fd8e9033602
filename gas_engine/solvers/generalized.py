"""The Generalized Solver (arXiv 2510.17699): a few hundred scalars around DPM-Solver++ theory -> a tableau.

Shape legend: K steps; lag 0 is the newest evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..schedule import Schedule
from ..tableau import Tableau
from ._theory import Steps, band, dpmpp_terms
from ._times import LearnedTimes
from .named import MAKERS, checked_name

FORMS = ("theory", "s4s", "linear")


class GeneralizedSolver(LearnedTimes):
    """Learned times (theta), coefficients (phi_a, phi_c) and told-time offsets (xi) of a K-step multistep solver.

    Step n uses order min(n+1, order). With ``theory`` (default) the coefficients are additive corrections, initially
    zero, to DPM-Solver++ (section 3 of the paper)::

        x+ = (r + a_1) x - (alpha phi1 + c_1) m_0 + (alpha phi2 + c_2) D1 - (alpha phi3 + c_3) D2
             + sum_{i>=4} c_i m_{i-1} + sum_{i>=2} a_i x_{n-i+1}            (order >= 3; r = sigma+/sigma)

    ``theory=False`` is the S4S form of the paper's Table 3, ``x+ = r y + C sum a_i m_{i-1}`` with
    ``y = r x + C sum c_i m_{i-1}``, ``C = -alpha phi1``; ``theory="linear"`` the plain linear multistep form
    ``x+ = sum a_i x_{n-i+1} + sum c_i m_{i-1}``. Both start at the DPM-Solver++ weights, and the latter so at its
    samples: the former has r^2 before x, whatever is learned.

    Another ``base`` (a name of ``named_solver``, but heun) is any tableau A, B of estimates S, of data or noise, as a
    function of the learned times, with corrections of its newest ``order`` lags::

        x+ = sum_i (A[n, n-i+1](theta) + a_i) x_{n-i+1} + (B[n, n-i+1](theta) + c_i) S_{i-1}

    Parameters, all float64 on the CPU: ``theta`` [K-1] (logits of stick breaking; the first belongs to the time
    nearest t_eps), ``xi`` [K], ``phi_a`` and ``phi_c`` [K, order] (second index: lag, 0 = newest).

    ``start`` gives other initial times than the uniform grid: a grid's name or K+1 falling times. Raises ValueError
    for K outside 1..32, an order outside 1..K, an unknown base, or times that do not fall from t_start to t_eps.

        solver = GeneralizedSolver(steps=4, schedule=denoiser.schedule, t_eps=1e-3)
        x = rollout(denoiser, noise, solver.tableau(denoiser.prediction))
    """

    family = "gs"
    settings = ("order", "base", "theory")

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
        super().__init__(steps, schedule, t_eps, start)
        order = steps if order is None else order
        form = {True: "theory", False: "s4s"}.get(theory, theory) if isinstance(theory, bool) else theory
        if not 1 <= order <= steps:
            raise ValueError(f"order must be between 1 and steps = {steps}, got {order}")
        if form not in FORMS:
            raise ValueError(f"theory must be True, False or 'linear', got {theory!r}")
        self.order, self.base, self.form = order, checked_name(base, base=True), str(form)
        if self.base != "dpmpp3m" and self.form != "theory":
            raise ValueError(f"the form {form} is of the base dpmpp3m, got base {base!r}; leave one of them out")
        self.orders = torch.arange(1, steps + 1).clamp(max=order)
        # Lag i exists where i earlier evaluations do. c_i corrects the gain of its own term: of -m_0, of -D10
        # (order 2) or +D1 (order 3), of -D2; from lag 3 on, of m_{i-1}.
        self._used = (torch.arange(order) < self.orders[:, None]).to(torch.float64)
        self._sign = self._used.clone()
        self._sign[:, [i for i in (0, 2) if i < order]] *= -1
        if order > 1:
            self._sign[self.orders == 2, 1] *= -1
        a, c = self._start_coefficients(self.times().detach())
        self.phi_a, self.phi_c = nn.Parameter(a), nn.Parameter(c)

    @property
    def theory(self) -> bool | str:
        """The constructor's argument: True, False or "linear"."""
        return {"theory": True, "s4s": False}.get(self.form, self.form)

    def tableau(self, prediction: str = "data") -> Tableau:
        """The tableau for a network of the given prediction type; about K^2 numbers, vectorised, differentiable."""
        times = self.times()
        if self.base == "dpmpp3m":
            terms = dpmpp_terms(Steps.of(self.schedule, times), self.orders)
            of, (a, b) = "data", getattr(self, f"_{self.form}")(*terms)
        else:
            base = MAKERS[self.base](self.schedule, times)
            a, b = base.A + band(self.phi_a * self._used), base.B + band(self.phi_c * self._used)
            of = str(base.prediction)
        solver = Tableau(
            a, b, self.told_times(times), prediction=of, nodes=times, schedule=self.schedule,
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
