"""A learned solver as plain numbers: what a program needs to run it, and nothing of this package.

Shape legend: K steps, rows of a lower triangle, lists of float64 that JSON carries to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters._diffusers_schedulers import PREDICTIONS
from ..architectures.wrappers import LABELS, network_label
from ..schedule import Schedule
from ..solvers import LearnedTimes, classical, load_solver
from ..tableau import Tableau

Solvers = Path | str | LearnedTimes | Iterable[Path | str | LearnedTimes]
THEORY_ORDER = 2


def opened(solvers: Solvers) -> list[LearnedTimes]:
    """Solvers, or files of them, of different K on one schedule, fewest steps first; one of several K is as many
    solvers. Raises ValueError otherwise."""
    given = [solvers] if isinstance(solvers, (str, Path, LearnedTimes)) else solvers
    files = [s if isinstance(s, LearnedTimes) else load_solver(s) for s in given]
    for solver in files:
        solver.check_guidance(None)  # one for a range is to be asked for a scale, with at(guidance=...)
    found = [one for solver in files for one in solver.each()]
    found.sort(key=lambda solver: solver.steps)
    counts = [solver.steps for solver in found]
    if not counts or len(set(counts)) != len(counts):
        raise ValueError(f"the solvers must be at least one, and one for each number of steps, got {counts}")
    for other in found[1:]:
        if other.schedule != found[0].schedule:
            raise ValueError(f"the solvers are of two schedules, {found[0].schedule} and {other.schedule}")
    return found


@torch.no_grad()
def for_diffusers(solvers: Solvers, prediction: str) -> dict[str, Any]:
    """What ``GASScheduler`` is constructed from: for every K the learned labels and those of the nodes, signal and
    noise at the nodes, the rows of the tableau folded for ``prediction``, and rows of theory for missing history.

    Raises ValueError for an unknown prediction, or for a schedule whose networks count no labels (``vp_linear``).

        config = for_diffusers(["k4.safetensors", "k6.safetensors"], "noise")
    """
    found = opened(solvers)
    if found[0].schedule.kind == "vp_linear":
        raise ValueError(
            f"{found[0].schedule} is continuous, and pipelines of diffusers count discrete labels or flow times; "
            "export to k-diffusion or ComfyUI instead"
        )
    numbers: dict[str, Any] = {}
    for solver in found:
        tableau = solver.tableau(prediction)
        assert tableau.nodes is not None
        alphas, sigmas, _ = solver.schedule(tableau.nodes)
        numbers[str(solver.steps)] = {
            "labels": network_label(solver.schedule, tableau.t_net).tolist(),
            "nodes": network_label(solver.schedule, tableau.nodes[:-1]).tolist(),
            "alphas": alphas.tolist(),
            "sigmas": sigmas.tolist(),
            "A": _rows(tableau.A),
            "B": _rows(tableau.B),
            "theory": _theory(tableau, prediction),
        }
    return {
        "solvers": numbers,
        "prediction_type": next(name for name, ours in PREDICTIONS.items() if ours == prediction),
        "num_train_timesteps": len(found[0].schedule.parameters.get("alphas_cumprod", range(LABELS))),
    }


@torch.no_grad()
def for_sigma_space(solvers: Solvers) -> dict[str, Any]:
    """What ``sample_gas`` runs on: the solvers in the scaling of k-diffusion, for denoisers ``(y, sigma) -> data``.

    Variance preserving: y = x / alpha at noise level sigma / alpha. Flow: y = x at sigma. For every K: ``sigmas`` at
    the nodes [K+1], ``told`` sigmas [K] and the ``scale`` [K] of the input that goes with them, and the rows A, B of
    y[n+1] = sum_j A[n,j] y[j] + B[n,j] D[j], where D[j] = denoiser(scale[j] y[j], told[j]).
    """
    found = opened(solvers)
    flow = found[0].schedule.kind == "flow"
    numbers = {}
    for solver in found:
        tableau = solver.tableau("data")
        assert tableau.nodes is not None
        levels, scale = _levels(solver.schedule, tableau.nodes, flow)
        told, told_scale = _levels(solver.schedule, tableau.t_net, flow)
        numbers[str(solver.steps)] = {
            "sigmas": levels.tolist(),
            "told": told.tolist(),
            "scale": (scale[:-1] / told_scale).tolist(),
            "A": _rows(tableau.A * scale[:-1] / scale[1:, None]),
            "B": _rows(tableau.B / scale[1:, None]),
        }
    return {"kind": "flow" if flow else "vp", "model": found[0].facts.get("model"), "solvers": numbers}


def _levels(schedule: Schedule, t: Tensor, flow: bool) -> tuple[Tensor, Tensor]:
    """(noise level of k-diffusion, factor from its states to ours)."""
    alpha, sigma, _ = schedule(t)
    return (sigma, torch.ones_like(alpha)) if flow else (sigma / alpha, alpha)


def _rows(matrix: Tensor) -> list[list[float]]:
    return [row[: n + 1] for n, row in enumerate(matrix.tolist())]


def _theory(tableau: Tableau, prediction: str) -> list[list[Mapping[str, Sequence[float]]]]:
    """For steps 1 .. K-1: the rows of DPM-Solver++ on the learned nodes by how many evaluations are there, one or two.

    What a sampler falls back on that begins at a later node. It tells the network the nodes' own times: a third to a
    half of the error on the digits, because learned offsets go with learned coefficients.
    """
    assert tableau.nodes is not None and tableau.schedule is not None
    rows: list[list[Mapping[str, Sequence[float]]]] = [[] for _ in range(tableau.steps)]
    for start in range(tableau.steps - 1, 0, -1):
        plain = classical.dpmpp(tableau.schedule, tableau.nodes[start:], THEORY_ORDER).fold(prediction)
        for j in range(min(THEORY_ORDER, plain.steps)):
            rows[start + j].append({"A": plain.A[j, : j + 1].tolist(), "B": plain.B[j, : j + 1].tolist()})
    return rows[1:]
