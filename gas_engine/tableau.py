"""A solver is data: lower-triangular coefficients, the times a network is told, and nothing else.

    x[n+1] = sum_{j<=n} A[n,j] x[j] + B[n,j] S[j],      S[j] made from F[j] = net(c_in[j] x[j], t_net[j])

Shape legend: K network evaluations. Everything is float64 on the CPU and differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .schedule import Schedule

PREDICTIONS = ("noise", "data", "velocity", "flow")
# A signal level below that of any variance preserving schedule in use: 0.0066 of the linear one, 0.068 of SD's.
NEXT_TO_NOISE = 1e-3


@dataclass(frozen=True, eq=False, repr=False)
class Tableau:
    """The coefficients of one sampler with K network evaluations.

    ``A``, ``B`` [K, K] lower triangular, ``t_net`` [K] the told times in the schedule's t, ``c_in`` [K] the scale of
    the network's input (ones unless given), all float64. ``prediction`` says what B multiplies: an estimate S of the
    "data" or "noise" (or "velocity", "flow") at the state's own time, which ``fold`` expresses through the output of
    a given network; once ``folded``, the output itself of such a network; None: a network's output, unchecked.
    ``nodes`` [K+1] are the times of the states x[0..K]; ``fold`` needs them and the schedule.
    Memory: 2 K^2 + 3 K numbers.

    Raises ValueError, with the value seen, for a wrong shape, dtype, triangle, or a number that is not finite.

        tableau = classical.dpmpp(schedule, times, order=3)
        x = rollout(denoiser, noise, tableau)
    """

    A: Tensor
    B: Tensor
    t_net: Tensor
    c_in: Tensor | None = None
    prediction: str | None = None
    nodes: Tensor | None = None
    schedule: Schedule | None = None
    folded: bool = False
    name: str = "tableau"

    def __post_init__(self) -> None:
        if self.prediction is not None:
            _check_prediction(self.prediction)
        if self.A.ndim != 2 or self.A.shape[0] != self.A.shape[1] or self.A.shape[0] == 0:
            raise ValueError(f"A must be square, K x K with K >= 1, got {tuple(self.A.shape)}")
        steps = self.A.shape[0]
        if self.c_in is None:
            object.__setattr__(self, "c_in", torch.ones(steps, dtype=torch.float64))
        wanted = {"A": (steps, steps), "B": (steps, steps), "t_net": (steps,), "c_in": (steps,), "nodes": (steps + 1,)}
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape} in a tableau of {steps} steps, got {tuple(value.shape)}"
                )
            if value.dtype != torch.float64 or value.device.type != "cpu":
                raise ValueError(f"{name} must be float64 on the CPU, got {value.dtype} on {value.device}")
        numbers = {name: getattr(self, name).detach() for name in wanted if getattr(self, name) is not None}
        if not bool(torch.cat([value.flatten() for value in numbers.values()]).isfinite().all()):
            name = next(name for name, value in numbers.items() if not bool(value.isfinite().all()))
            raise ValueError(f"{name} of {self.name} is not finite: its times or weights diverged")
        for name in ("A", "B"):
            if bool(numbers[name].triu(1).any()):
                raise ValueError(f"{name} must be lower triangular: a step cannot use states that come after it")

    @property
    def steps(self) -> int:
        """K, the number of network evaluations."""
        return self.A.shape[0]

    @cached_property
    def order(self) -> int:
        """The longest history that any step uses, in evaluations (1: the newest state and output only)."""
        row, column = torch.nonzero((self.A.detach() != 0) | (self.B.detach() != 0), as_tuple=True)
        return int((row - column).max()) + 1 if len(row) else 1

    @property
    def explicit_input_scale(self) -> bool:
        """Whether the tableau scales the network's input (``c_in`` differs from one or is trained)."""
        assert self.c_in is not None
        return self.c_in.requires_grad or bool((self.c_in.detach() != 1).any())

    @property
    def requires_grad(self) -> bool:
        """Whether any coefficient or time is differentiable."""
        return any(t is not None and t.requires_grad for t in (self.A, self.B, self.t_net, self.c_in))

    @cached_property
    def reversible(self) -> bool:
        """Whether x[n-p+1] can be solved from x[n+1] and the newer states without its own network output.

        With window p = ``order``: A[n, n-p+1] != 0 and B[n, n-p+1] = 0 for every n >= p-1.
        """
        window = self.order
        if window < 2 or self.steps < window:
            return False
        a, b = (m.detach().diagonal(1 - window) for m in (self.A, self.B))
        return bool((a != 0).all()) and bool((b == 0).all())

    def fold(self, prediction: str) -> Tableau:
        """The same solver for a network of another prediction type: B and part of A absorb the conversion.

        The network's output F, told t' = t_net, gives the noise estimate e (alpha', sigma' at t'): F for "noise",
        (x - alpha' F) / sigma' for "data", alpha' F + sigma' x for "velocity" (variance preserving), x + alpha' F
        for "flow" (alpha' + sigma' = 1). The solver
        at t uses e, m = (x - sigma e) / alpha, or a mix of both. So S = p x + q F, with scalars p and q (each [K]).
        Where alpha is next to 0, as at the start of a flow, (x - sigma e) / alpha would multiply an offset t' - t by as
        much as 1e6: there m is taken at t' as well, (x - sigma' e) / alpha', which is the same without an offset.

        Raises ValueError for an unknown type or when the tableau was made without nodes and schedule.
        """
        _check_prediction(prediction)
        if self.folded and prediction == self.prediction:
            return self
        if self.folded or self.prediction is None or self.nodes is None or self.schedule is None:
            made_for = f"already folded for a {self.prediction} network" if self.folded else "without nodes or schedule"
            raise ValueError(
                f"{self.name} is {made_for}, so it cannot be folded for a {prediction} network; "
                "ask the solver for its own tableau of that prediction"
            )
        alphas, sigmas, _ = self.schedule(torch.cat([self.nodes[:-1], self.t_net]))
        (alpha, told_alpha), (sigma, told_sigma) = alphas.chunk(2), sigmas.chunk(2)
        noise = alpha < NEXT_TO_NOISE
        alpha, sigma = torch.where(noise, told_alpha, alpha), torch.where(noise, told_sigma, sigma)
        e_x, e_f = _noise_estimate(prediction, told_alpha, told_sigma)
        p, q = _from_noise(self.prediction, alpha, sigma, e_x, e_f)
        return replace(self, A=self.A + self.B * p, B=self.B * q, prediction=prediction, folded=True)

    def __repr__(self) -> str:
        head = f"{self.name}: {self.steps} steps, order {self.order}, {self.prediction or 'raw'} prediction"
        head += ", reversible" if self.reversible else ""
        lines = [head, f"{'n':>3} {'t_net':>9}  A[n, :] | B[n, :]"]
        for n in range(self.steps):
            a, b = (" ".join(f"{v:8.4f}" for v in m[n, : n + 1].tolist()) for m in (self.A.detach(), self.B.detach()))
            lines.append(f"{n:>3} {float(self.t_net[n].detach()):9.6f}  {a} | {b}")
        return "\n".join(lines)


def _check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}; it must be one of {', '.join(PREDICTIONS)}")


def _noise_estimate(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(u, v) with noise estimate e = u x + v F."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "noise":
        return zero, one
    if prediction == "data":
        return 1 / sigma, -alpha / sigma
    if prediction == "velocity":
        power = alpha.square() + sigma.square()
        return sigma / power, alpha / power
    return one / (alpha + sigma), alpha / (alpha + sigma)


def _from_noise(wanted: str, alpha: Tensor, sigma: Tensor, e_x: Tensor, e_f: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with S = p x + q F for the wanted quantity S, given e = e_x x + e_f F."""
    m_x, m_f = (1 - sigma * e_x) / alpha, -sigma * e_f / alpha
    if wanted == "noise":
        return e_x, e_f
    if wanted == "data":
        return m_x, m_f
    if wanted == "velocity":
        return alpha * e_x - sigma * m_x, alpha * e_f - sigma * m_f
    return e_x - m_x, e_f - m_f
