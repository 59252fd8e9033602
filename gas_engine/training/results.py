"""What a finished run leaves: the solver, a table beside every classical solver, pictures, and a report."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import comparison, pictures, reporting
from .._cli import console, progress
from ..conditioning import nodes
from ..denoiser import Denoiser
from ..files import write_text
from ..metrics import judge_of
from ..models import PlacedModelOptions
from ..solvers import LearnedTimes, grid, save_solver
from ..tableau import Tableau
from . import setup
from .directory import RunDirectory
from .options import Config
from .trainer import Trainer

PAGE = "report.html"


def finish(
    trainer: Trainer, directory: RunDirectory, config: Config, selection: comparison.Samples, start: Tableau,
    others: Sequence[tuple[str, LearnedTimes]] = (),
) -> None:  # fmt: skip
    """Write the solver, measure it and ``others`` on held-out seeds, write the table and the pictures."""
    denoiser, student, batch, group = trainer.denoiser, trainer.average, config.sample_batch, trainer.group
    students = student.each()
    held_out = setup.samples(denoiser, setup.HELD_OUT_SEEDS[: config.held_out], config, trainer.device, group)
    held_out = dataclasses.replace(held_out, judge=judge_of(denoiser.name))

    def measured(solver: LearnedTimes, steps: int, name: str, setting: str = "") -> comparison.Distance:
        said = ", ".join(filter(None, ("" if setting and len(students) == 1 else f"K = {steps}", setting)))
        own = comparison.solver_for(solver, steps, denoiser)
        return comparison.distance(denoiser, own, held_out, name, said, batch, group)

    mine = [
        measured(student, k, f"learned ({_family(config)})", f"{trainer.step} updates") for k in student.steps_range
    ]
    if directory.writes:
        facts = (
            {"prediction": denoiser.prediction, "guidance": 1.0}
            | denoiser.facts()
            | {
                "loss": config.loss,
                "version": _version(),
                "train_seeds": None if _published(config) else config.train_seeds,
            }
        )
        numbers = [{"l1": row.l1, "rmse": row.rmse, "psnr": row.psnr} for row in mine]
        by_steps = {str(one.steps): row for one, row in zip(students, numbers, strict=True)}
        metrics: dict[str, Any] = numbers[0] if len(numbers) == 1 else {"by_steps": by_steps}
        metrics["held_out_seeds"] = f"50000-{49_999 + len(held_out.noise)}"
        save_solver(student, directory.solver, model=denoiser.name, **facts, metrics=metrics)
    theirs = [(k, measured(other, k, name)) for name, other in others for k in other.steps_range]
    classical: list[list[comparison.Distance]] = [[] for _ in students]
    if config.evaluation == "full":
        with progress() as bar:
            task = bar.add_task("classical solvers", total=comparison.VARIANTS * len(students), note="")
            for count, one in enumerate(students):
                classical[count] = comparison.classical_distances(
                    denoiser, one.steps, selection, held_out, batch, lambda: bar.advance(task), group
                )  # fmt: skip
                bar.update(task, completed=comparison.VARIANTS * (count + 1))
    rows, shown = _rows(students, mine, theirs, classical)
    if held_out.judge is not None:
        rows.append(comparison.of_teacher(held_out, f"{config.teacher.solver}, {config.teacher.steps} evaluations"))
    if not directory.writes:
        return
    write_text(directory.path / "comparison.md", comparison.as_markdown(rows))
    write_text(directory.path / "comparison.csv", comparison.as_csv(rows))
    if config.pictures:
        _compare_pictures(
            directory.path / "comparison.png", denoiser, config, held_out.teacher.cpu(), shown, trainer.device
        )
        _draw(directory, config, denoiser, student, start)
    console.print(
        comparison.as_rich(rows, f"distance to the {config.teacher.steps}-evaluation teacher at K = {config.steps}")
    )
    used = f"--solver {directory.solver}" + ("" if len(students) == 1 else f" --steps {student.steps}")
    if student.guidance_range is not None:
        config = dataclasses.replace(config, guidance=f"{nodes(student.guidance_range)[1]:g}")  # one to begin with
    page = directory.path / PAGE
    drawn = (
        f"pictures  {directory.path}/comparison.png  schedule.png  tableau.png  history.png\n"
        f"report    {page} (opens in any browser; several runs: gas-engine report RUN RUN --out FILE)\n"
    )
    console.print(
        f"solver    {directory.solver} ({directory.solver.stat().st_size / 1024:.1f} kB)\n"
        f"{drawn if config.pictures else ''}"
        f"sample    python -m gas_engine.sample {_model_options(config)} {used} --out samples",
        soft_wrap=True,
    )


def _rows(
    students: Sequence[LearnedTimes], mine: list[comparison.Distance], theirs: list[tuple[int, comparison.Distance]],
    classical: list[list[comparison.Distance]],
) -> tuple[list[comparison.Distance], list[comparison.Distance]]:  # fmt: skip
    """The rows of the table, and those to draw: of several K the student's, each above what else has that K, of the
    classical solvers the best; ``theirs`` come with their K."""
    if len(students) == 1:
        rows = [*mine, *(row for _, row in theirs), *classical[0]]
        return rows, rows[: len(theirs) + 2]
    rows = []
    for one, row, best in zip(students, mine, classical, strict=True):
        rows += [row, *(other for steps, other in theirs if steps == one.steps)]
        rows += [dataclasses.replace(b, setting=f"K = {one.steps}, {b.setting}") for b in best[:1]]
    known = {one.steps for one in students}
    return rows + [row for steps, row in theirs if steps not in known], mine


def _draw(directory: RunDirectory, config: Config, denoiser: Denoiser, student: LearnedTimes, start: Tableau) -> None:
    """What was learned, as pictures, and the report's page."""
    students = student.each()
    names = [f"K = {one.steps}" for one in students] if len(students) > 1 else ["learned"]
    times = {name: one.times() for name, one in zip(names, students, strict=True)}
    told = {names[-1]: student.told_times()}
    for scale in student.guidance_range or ():
        times[f"guidance {scale:g}"] = student.at(guidance=scale).times()
    if len(students) == 1:
        grids = ("uniform", "quadratic", "logSNR")
        times |= {name: grid(name, student.schedule, student.steps, config.t_eps) for name in grids}
    pictures.schedule_plot(directory.path / "schedule.png", student.schedule, times, told)
    pictures.tableau_plot(directory.path / "tableau.png", student.tableau(denoiser.prediction), start)
    _history(directory, student.steps, f"{denoiser.name}: learned times, K = {student.steps}")
    reporting.write_page(directory.path / PAGE, [reporting.read_run(directory.path)])


def _family(config: Config) -> str:
    """GAS is GS with an adversary; the form and the base where they were chosen."""
    name = "gas" if config.adversarial and config.student == "gs" else config.student
    said = [name, config.form and f"{config.form} form", config.base and f"base {config.base}"]
    if config.adversarial and name != "gas":
        said.append("adversarial")
    return ", ".join(filter(None, said))


def _compare_pictures(
    path: Path, denoiser: Denoiser, config: Config, teacher: Tensor, rows: list[comparison.Distance],
    device: torch.device,
) -> None:  # fmt: skip
    """Teacher, student and the best classical solver above their errors, as a picture and for the report.

    Nothing for states that are no images. Of a student of several K, ``rows`` are its own, the fewest steps first.
    """
    if len(denoiser.shape or ()) != 3:
        return
    mine, others = rows[0], rows[1:]
    count = 12 if denoiser.decoder is not None else reporting.MOST
    states = (teacher, *(row.samples for row in rows))
    teacher, *shown = (pictures.pictures_of(denoiser, some[:count], device) for some in states)
    said = [("teacher", f"{config.teacher.steps} evaluations"), *((row.solver, row.setting) for row in rows)]
    reporting.save_samples(path.with_name(reporting.SAMPLES), said, [teacher, *shown])
    several = bool(others) and others[0].solver == mine.solver
    names = [row.setting.partition(",")[0] if several else row.solver for row in rows]
    names[0] = names[0] if several else "learned"
    drawn = [(f"teacher, {config.teacher.steps}", teacher), *zip(names, shown, strict=True)]
    drawn += [(f"|{name} - teacher|", samples - teacher) for name, samples in zip(names, shown, strict=True)]
    title = f"{denoiser.name}: {config.steps} evaluations, held-out seeds 50000 on; L1: "
    ends = [*zip(names, rows, strict=True)][:: max(1, len(rows) - 1) if several else 1]
    pictures.image_rows(path, drawn, title + ", ".join(f"{name} {row.l1:.4f}" for name, row in ends))


def _history(directory: RunDirectory, steps: int, title: str) -> None:
    """The course of times and tableau of one K, from the rows that were written over the run."""
    lines = directory.history.read_text().splitlines() if directory.history.exists() else []
    rows = [row for row in map(json.loads, lines) if len(row["told"]) == steps]
    if rows:
        updates, times, told, a, b = ([row[name] for row in rows] for name in ("step", "times", "told", "A", "B"))
        pictures.history_plot(directory.path / "history.png", updates, times, told, a, b, title)


def _model_options(config: Config) -> str:
    """What of the command line says which model this is, and what it is told."""
    names = [field.name for field in dataclasses.fields(PlacedModelOptions) if field.name != "model"]
    given = {name: getattr(config, name) for name in names}
    default = PlacedModelOptions()
    said = {"model": config.model} | {name: v for name, v in given.items() if v != getattr(default, name)}
    return " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in said.items())


def _published(config: Config) -> bool:
    """Whether the run learned from rows of a published set, which are no seeds."""
    return config.teacher_set is not None and config.teacher_set.is_file()


def _version() -> str:
    from .. import __version__

    return __version__
