"""Distances to the teacher on held-out seeds: a student beside the best of every classical family at the same K."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from .conditioning import moved, scale_of, take
from .denoiser import Denoiser, seeded
from .distributed import ALONE, Group
from .metrics import Judge
from .rollout import rollout
from .schedule import Schedule
from .solvers import LearnedTimes
from .solvers.grids import GRIDS
from .solvers.named import FAMILIES, named_solver
from .tableau import Tableau

ByScale = Callable[[float], Tableau]
T_EPS = (1e-3, 1e-4)
VARIANTS = sum(map(len, FAMILIES.values()))


@dataclass(frozen=True)
class Samples:
    """Seeds with their noise, conditions and teacher samples, [N, *shape], on one device.

    ``judge``: takes Frechet distances, where there are features for it. ``scales``: of guidance, of each sample.
    """

    noise: Tensor
    cond: Any
    teacher: Tensor
    judge: Judge | None = None
    scales: Sequence[float] = ()

    @classmethod
    def of(
        cls, denoiser: Denoiser, seeds: Iterable[int], teacher: Tensor, device: torch.device,
        judge: Judge | None = None,
    ) -> Samples:  # fmt: skip
        noise, cond = seeded(denoiser, list(seeds))
        scales = [scale_of(denoiser.guidance, seed) for seed in seeds]
        return cls(noise.to(device), moved(cond, device), teacher.to(device), judge, scales)

    def run(self, denoiser: Denoiser, solver: Tableau | ByScale, rows: slice) -> Tensor:
        """A solver's samples of some rows, on the CPU; of one that hangs on the guidance, scale by scale."""
        if isinstance(solver, Tableau):
            return rollout(denoiser, self.noise[rows], solver, take(self.cond, rows, len(self.noise))).cpu()
        every = range(len(self.noise))[rows]
        found = torch.empty(len(every), *self.noise.shape[1:])
        for scale in {self.scales[n]: None for n in every}:
            some = [n for n in every if self.scales[n] == scale]
            cond = take(self.cond, some, len(self.noise))
            found[[n - every[0] for n in some]] = rollout(denoiser, self.noise[some], solver(scale), cond).cpu()
        return found


@dataclass(frozen=True)
class Distance:
    """How far samples are from the teacher's: mean |x-y|, root mean square, PSNR in dB for a range of 2; and
    their Frechet distances on features to the data and to the teacher's samples, where there are features."""

    solver: str
    setting: str
    l1: float
    rmse: float
    samples: Tensor
    frechet: tuple[float, float] | None = None

    @property
    def psnr(self) -> float:
        return 20 * float((2 / torch.tensor(self.rmse, dtype=torch.float64)).log10())  # of 0, inf and nan as well


def solver_for(solver: LearnedTimes, steps: int, denoiser: Denoiser) -> Tableau | ByScale:
    """The tableau of a learned solver at K for the model, or, where its guidance is a range, that of each scale."""
    told = denoiser.told_guidance
    if solver.guidance_range is None or not isinstance(told, tuple):
        return solver.at(steps, told).tableau(denoiser.prediction)
    return lambda scale: solver.at(steps, scale).tableau(denoiser.prediction)


@torch.no_grad()
def distance(
    denoiser: Denoiser, solver: Tableau | ByScale, data: Samples, name: str, setting: str = "", batch: int = 128,
    group: Group = ALONE,
) -> Distance:  # fmt: skip
    """Run one solver on the data's noise, batch by batch on the processes of ``group``; its distance to the teacher."""

    def run(start: int) -> Tensor:
        return data.run(denoiser, solver, slice(start, start + batch))

    samples = torch.cat(group.map(run, range(0, len(data.noise), batch)))
    error = (samples - data.teacher.cpu()).double()
    far = float(error.abs().mean()), float(error.square().mean().sqrt())
    return Distance(name, setting, *far, samples, _judged(samples, data))


def of_teacher(data: Samples, setting: str) -> Distance:
    """The teacher's own row."""
    samples = data.teacher.cpu()
    return Distance("teacher", setting, 0.0, 0.0, samples, _judged(samples, data))


def _judged(samples: Tensor, data: Samples) -> tuple[float, float] | None:
    return None if data.judge is None else data.judge.distances(samples, data.teacher.cpu())


class Variant(NamedTuple):
    """A classical solver by its name, grid of times and t_eps."""

    name: str
    grid: str
    t_eps: float

    def tableau(self, schedule: Schedule, steps: int) -> Tableau:
        return named_solver(self.name, schedule, steps, self.grid, self.t_eps)

    def __str__(self) -> str:
        return f"{self.name}, {self.grid}, {self.t_eps:g}"


def best_variants(
    denoiser: Denoiser, steps: int, selection: Samples, batch: int = 128, advance: Callable[[], None] | None = None,
    group: Group = ALONE,
) -> dict[str, Variant]:  # fmt: skip
    """For every classical family, the variant, grid and t_eps of least L1 on ``selection`` at ``steps`` evaluations.

    The processes of ``group`` try a variant each; ``advance`` is told of every one of ``VARIANTS``.
    """
    t_eps = [t for t in T_EPS if t > denoiser.schedule.domain[0]]

    def best_of(name: str) -> tuple[float, Variant]:
        tried = []
        for variant in (Variant(name, grid, t) for grid in GRIDS for t in t_eps):
            l1 = distance(denoiser, variant.tableau(denoiser.schedule, steps), selection, name, batch=batch).l1
            tried.append((math.inf if math.isnan(l1) else l1, variant))
        if advance is not None:
            advance()
        return min(tried, key=lambda row: row[0])

    names = [name for variants in FAMILIES.values() for name in variants]
    best = dict(zip(names, group.map(best_of, names), strict=True))
    return {
        family: min((best[name] for name in variants), key=lambda row: row[0])[1]
        for family, variants in FAMILIES.items()
    }


def classical_distances(
    denoiser: Denoiser, steps: int, selection: Samples, held_out: Samples, batch: int = 128,
    advance: Callable[[], None] | None = None, group: Group = ALONE,
) -> list[Distance]:  # fmt: skip
    """The best variant of every classical family on ``selection``, measured on ``held_out``."""
    found = [
        distance(denoiser, variant.tableau(denoiser.schedule, steps), held_out, family, str(variant), batch, group)
        for family, variant in best_variants(denoiser, steps, selection, batch, advance, group).items()
    ]
    return sorted(found, key=lambda row: row.l1)


def mean_l1(rows: Iterable[Distance]) -> float:
    """The geometric mean of L1 distances, to which every K of a solver adds alike."""
    return float(torch.tensor([row.l1 for row in rows], dtype=torch.float64).log().mean().exp())


def as_rich(rows: list[Distance], title: str) -> Table:
    """The comparison for a terminal; ratio is L1 over that of the newest row of the first row's solver."""
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1))
    table.add_column("solver", no_wrap=True)
    table.add_column("setting")
    heads = ["L1", "RMSE", "ratio"]
    if any(row.frechet is not None for row in rows):
        heads = ["L1", "ratio", "FD data", "teacher"]
        table.caption = "FD: Frechet distance on features to the data, and to the teacher's samples"
    for head in heads:
        table.add_column(head, no_wrap=True, justify="right")
    first = rows[0]
    for row in rows:
        first = row if row.solver == rows[0].solver else first
        cells = {"L1": f"{row.l1:.4f}", "RMSE": f"{row.rmse:.4f}", "ratio": f"{row.l1 / first.l1:.2f}"}
        cells |= dict(zip(("FD data", "teacher"), _frechet(row), strict=True))
        style = "bold" if row is first else None
        table.add_row(row.solver, row.setting, *(cells[head] for head in heads), style=style)
    return table


def as_markdown(rows: list[Distance]) -> str:
    """The comparison as a Markdown table."""
    heads = ["solver", "setting (variant, grid, t_eps)", "L1", "RMSE", "PSNR, dB", "FD to data", "FD to teacher"]
    lines = [heads, ["---"] * len(heads)]
    lines += [[r.solver, r.setting, f"{r.l1:.4f}", f"{r.rmse:.4f}", f"{r.psnr:.1f}", *_frechet(r)] for r in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(rows: list[Distance]) -> str:
    """The comparison as CSV; fd_data and fd_teacher are Frechet distances."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["solver", "setting", "l1", "rmse", "psnr", "fd_data", "fd_teacher"])
    for row in rows:
        numbers = (f"{row.l1:.6g}", f"{row.rmse:.6g}", f"{row.psnr:.4g}")
        writer.writerow([row.solver, row.setting, *numbers, *_frechet(row)])
    return text.getvalue()


def _frechet(row: Distance) -> tuple[str, str]:
    return ("", "") if row.frechet is None else (f"{row.frechet[0]:.3g}", f"{row.frechet[1]:.3g}")
