"""Classical solvers as tableaux: a function of a schedule and K+1 falling times, differentiable in the times.

DDIM (Euler), Heun, DPM-Solver++ 1-3 multistep, UniPC, iPNDM and DEIS. None has a loop over samples: ``rollout`` runs
them all. Shape legend: K network evaluations, m data estimates, e noise estimates, newest first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..schedule import Schedule
from ..tableau import Tableau
from ._theory import Steps, band, checked_times, dpmpp_terms, phi


def ddim(schedule: Schedule, times: Tensor) -> Tableau:
    """DDIM, the exponential Euler method: ``x+ = (sigma+/sigma) x - alpha+ expm1(-h) m`` (arXiv 2010.02502).

    For rectified flow this is plain Euler. Order 1, K evaluations for K+1 times.
    """
    return dpmpp(schedule, times, order=1, name="ddim")


def dpmpp(
    schedule: Schedule, times: Tensor, order: int = 3, lower_order_final: bool = True, name: str | None = None
) -> Tableau:
    """DPM-Solver++ multistep of order 1, 2 or 3 (arXiv 2211.01095), with lower orders to warm up.

    ``lower_order_final`` ends with orders 2, 1, which is steadier at few steps. K evaluations for K+1 times.
    """
    times, orders = _prepare(schedule, times, order, 3, lower_order_final)
    ratio, gains, differences = dpmpp_terms(Steps.of(schedule, times), torch.tensor(orders))
    lags = (gains[:, :, None] * differences).sum(1)
    return Tableau(
        torch.diag(ratio), band(lags), times[:-1], prediction="data", nodes=times, schedule=schedule,
        name=name or f"dpmpp{order}m",
    )  # fmt: skip


def unipc(
    schedule: Schedule, times: Tensor, order: int = 3, variant: str = "bh1", lower_order_final: bool = True
) -> Tableau:
    """UniPC of order 1 to 3 with its corrector after every step but the last (arXiv 2302.04867, algorithms 1, 2).

    ``variant`` is B(h) = h ("bh1") or expm1(h) ("bh2"). The network is evaluated at predicted points; the corrected
    state is a linear combination of the predicted one and the estimates, so it needs no slot of its own.
    """
    times, orders = _prepare(schedule, times, order, 3, lower_order_final)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unknown UniPC variant {variant!r}; known: bh1, bh2")
    steps, count = Steps.of(schedule, times), len(times) - 1
    basis = torch.eye(2 * count, dtype=torch.float64)
    x, m = basis[:count], basis[count:]
    rows: list[Tensor] = []
    correction = torch.zeros(2 * count, dtype=torch.float64)
    for n, p in enumerate(orders):
        h, alpha = steps.h[n], steps.alpha_next[n]
        scale = -h if variant == "bh1" else torch.expm1(-h)
        lags = [(steps.lam[n - i] - steps.lam[n]) / h for i in range(1, p)]
        slopes = [(m[n - i] - m[n]) / lag for i, lag in enumerate(lags, start=1)]
        nodes, moments = _unipc_system([*lags, torch.ones_like(h)], h, scale)
        predict = [0.5 * torch.ones_like(h)] if p == 2 else _solve(nodes[: p - 1, : p - 1], moments[: p - 1])
        correct = [0.5 * torch.ones_like(h)] if p == 1 else _solve(nodes, moments)
        corrected = x[n] + correction
        euler = -alpha * torch.expm1(-h) * m[n]
        predicted = -alpha * scale * _sum(predict, slopes, m)
        rows.append(steps.sigma_next[n] / steps.sigma[n] * corrected + euler + predicted)
        if n + 1 < count:
            correction = -alpha * scale * _sum(correct, [*slopes, m[n + 1] - m[n]], m) - predicted
    return _from_rows(rows, times[:-1], "data", times, schedule, f"unipc{order}-{variant}")


def ipndm(schedule: Schedule, times: Tensor, order: int = 4) -> Tableau:
    """iPNDM of order 1 to 4: Adams-Bashforth on the noise estimate, lower orders to warm up (arXiv 2204.13902).

    ``x+ = (alpha+/alpha) x - sigma+ expm1(h) sum_i w_i e_i`` with (1), (3,-1)/2, (23,-16,5)/12, (55,-59,37,-9)/24.
    """
    times, orders = _prepare(schedule, times, order, 4, False)
    steps = Steps.of(schedule, times)
    gain = -steps.sigma_next * torch.expm1(steps.h)
    ratio = steps.alpha_next / steps.alpha
    return Tableau(
        torch.diag(ratio), gain[:, None] * adams_bashforth(orders), times[:-1], prediction="noise", nodes=times,
        schedule=schedule, name=f"ipndm{order}",
    )  # fmt: skip


def adams_bashforth(orders: list[int]) -> Tensor:
    """Weights w [K, K] of even steps, ``z[n+1] = z[n] + h sum_j w[n,j] d[j]``, each step of its own order 1 to 4."""
    adams = torch.tensor(
        [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]],
        dtype=torch.float64,
    )
    return band(adams[torch.tensor(orders) - 1])


def deis(schedule: Schedule, times: Tensor, order: int = 3, variable: str = "t") -> Tableau:
    """DEIS of order 1 to 4: the noise estimate extrapolated by a polynomial, integrated exactly (arXiv 2204.13902).

    ``x+ = (alpha+/alpha) x - alpha+ sum_i e_i integral of exp(-lambda) L_i``, L_i the Lagrange polynomials in t
    ("t", tAB-DEIS) or in lambda ("lam"), by 32-point Gauss-Legendre quadrature in lambda. Lower orders to warm up.
    """
    times, orders = _prepare(schedule, times, order, 4, False)
    if variable not in ("t", "lam"):
        raise ValueError(f"unknown DEIS variable {variable!r}; known: t, lam")
    steps, count = Steps.of(schedule, times), len(times) - 1
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(32))
    lags: list[Tensor] = []
    for n, p in enumerate(orders):
        lam = steps.lam[n] + steps.h[n] * (points + 1) / 2
        where, nodes = (schedule.inverse(lam), times) if variable == "t" else (lam, steps.lam)
        measure = weights * steps.h[n] / 2 * torch.exp(-lam)
        row = [(measure * _lagrange(where, nodes[n - p + 1 : n + 1].flip(0), i)).sum() for i in range(p)]
        lags.append(torch.stack([*row, *[row[0].new_zeros(())] * (order - p)]))
    weights_by_lag = -steps.alpha_next[:, None] * torch.stack(lags)
    return Tableau(
        torch.diag(steps.alpha_next / steps.alpha), band(weights_by_lag[:, :count]), times[:-1], prediction="noise",
        nodes=times, schedule=schedule, name=f"deis{order}",
    )  # fmt: skip


def heun(schedule: Schedule, times: Tensor, euler_final: bool = False) -> Tableau:
    """Heun's second-order method on ``dz/du = v`` with z linear in x (arXiv 2206.00364, algorithm 1 without churn).

    Variance preserving: z = x / alpha, u = sigma / alpha, v = e, as in EDM. Rectified flow: z = x, u = sigma,
    v = e - m, its own velocity, because sigma / alpha has no bound there.
    Two evaluations a step, so 2 (len(times) - 1) in all; with ``euler_final`` the last step is Euler's and one fewer.
    """
    times, _ = _prepare(schedule, times, 1, 1, False)
    alpha, sigma, _ = schedule(times)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if schedule.kind == "flow":
        prediction, scale, u, v_x, v_s = "data", one, sigma, 1 / sigma, -1 / sigma
    else:
        prediction, scale, u, v_x, v_s = "noise", alpha, sigma / alpha, zero, one
    count = len(times) - 1
    evaluations = 2 * count - (1 if euler_final else 0)
    basis = torch.eye(2 * evaluations, dtype=torch.float64)
    x, s = basis[:evaluations], basis[evaluations:]
    rows: list[Tensor] = []
    index: list[int] = [0]
    for n in range(count):
        now, du = len(rows), u[n + 1] - u[n]
        slope = v_x[n] * x[now] + v_s[n] * s[now]
        rows.append(scale[n + 1] * (x[now] / scale[n] + du * slope))
        index.append(n + 1)
        if len(rows) < evaluations:
            slope = (slope + v_x[n + 1] * x[now + 1] + v_s[n + 1] * s[now + 1]) / 2
            rows.append(scale[n + 1] * (x[now] / scale[n] + du * slope))
            index.append(n + 1)
    nodes = times[torch.tensor(index)]
    return _from_rows(rows, nodes[:-1], prediction, nodes, schedule, "heun")


def _prepare(
    schedule: Schedule, times: Tensor, order: int, highest: int, lower_order_final: bool
) -> tuple[Tensor, list[int]]:
    """Checked times and the order of each step: warm-up min(n+1, order), and K-n at the end if asked for."""
    if not 1 <= order <= highest:
        raise ValueError(f"order must be between 1 and {highest}, got {order}")
    times = checked_times(schedule, times)
    count = len(times) - 1
    return times, [min(n + 1, order, count - n if lower_order_final else order) for n in range(count)]


def _from_rows(
    rows: list[Tensor], t_net: Tensor, prediction: str, nodes: Tensor, schedule: Schedule, name: str
) -> Tableau:
    a, b = torch.stack(rows).chunk(2, dim=1)
    return Tableau(a, b, t_net, prediction=prediction, nodes=nodes, schedule=schedule, name=name)


def _unipc_system(lags: list[Tensor], h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """R[i, j] = lag_j^i and b[i] = (i+1)! varphi_{i+2}(-h) / B(h) (arXiv 2302.04867, equation 5)."""
    nodes = torch.stack(lags)
    powers = torch.stack([nodes**i for i in range(len(lags))])
    # h varphi_2(-h) = 1 - varphi_1 in the notation of phi(): -phi2 and so on, each by its own stable series.
    _, phi2, phi3 = phi(h)
    moment = [-phi2, 2 * phi3, 6 * (-phi3 / h - 1 / 6)]
    return powers, torch.stack(moment[: len(lags)]) / scale


def _solve(matrix: Tensor, right: Tensor) -> list[Tensor]:
    return list(torch.linalg.solve(matrix, right)) if len(right) else []


def _sum(weights: list[Tensor], terms: list[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like[0])
    for weight, term in zip(weights, terms, strict=True):
        total = total + weight * term
    return total


def _lagrange(x: Tensor, nodes: Tensor, i: int) -> Tensor:
    others = torch.cat([nodes[:i], nodes[i + 1 :]])
    return ((x[:, None] - others) / (nodes[i] - others)).prod(-1)
