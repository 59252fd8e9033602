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


def finish(
    trainer: Trainer, directory: RunDirectory, config: Config, selection: comparison.Samples, start: Tableau,
    others: Sequence[tuple[str, LearnedTimes]] = (),
) -> None:  # fmt: skip
    """Write the solver, measure it and ``others`` on held-out seeds, write the table and the pictures."""
    denoiser, student, batch, group = trainer.denoiser, trainer.average, config.sample_batch, trainer.group
    tableau = student.tableau(denoiser.prediction)
    held_out = setup.samples(denoiser, setup.HELD_OUT_SEEDS[: config.held_out], config, trainer.device, group)
    held_out = dataclasses.replace(held_out, judge=judge_of(denoiser.name))
    mine = comparison.distance(
        denoiser, tableau, held_out, f"learned ({_family(config)})", f"{trainer.step} updates", batch, group
    )  # fmt: skip
    if directory.writes:
        facts = (
            {"prediction": denoiser.prediction, "guidance": 1.0}
            | denoiser.facts()
            | {"loss": config.loss, "version": _version()}
        )
        metrics: dict[str, Any] = {"l1": mine.l1, "rmse": mine.rmse, "psnr": mine.psnr}
        metrics["held_out_seeds"] = f"50000-{49_999 + len(held_out.noise)}"
        save_solver(student, directory.solver, model=denoiser.name, **facts, metrics=metrics)
    rows = [mine]
    for name, other in others:
        other_tableau, said = other.tableau(denoiser.prediction), f"K = {other.steps}"
        rows.append(comparison.distance(denoiser, other_tableau, held_out, name, said, batch, group))
    if config.evaluation == "full":
        with progress() as bar:
            task = bar.add_task("classical solvers", total=comparison.VARIANTS, note="")
            rows += comparison.classical_distances(
                denoiser, config.steps, selection, held_out, batch, lambda: bar.advance(task), group
            )  # fmt: skip
            bar.update(task, completed=comparison.VARIANTS)
    shown = rows[: len(others) + 2]  # ours, and the best of the classical
    if held_out.judge is not None:
        rows.append(comparison.of_teacher(held_out, f"{config.teacher.solver}, {config.teacher.steps} evaluations"))
    if not directory.writes:
        return
    write_text(directory.path / "comparison.md", comparison.as_markdown(rows))
    write_text(directory.path / "comparison.csv", comparison.as_csv(rows))
    path, teacher = directory.path / "comparison.png", held_out.teacher.cpu()
    _compare_pictures(path, denoiser, config, teacher, shown, trainer.device)
    times = {"learned": student.times()} | {
        name: grid(name, student.schedule, config.steps, config.t_eps) for name in ("uniform", "quadratic", "logSNR")
    }
    pictures.schedule_plot(directory.path / "schedule.png", student.schedule, times, {"learned": student.told_times()})
    pictures.tableau_plot(directory.path / "tableau.png", tableau, start)
    _history(directory, f"{denoiser.name}: learned times, K = {config.steps}")
    page = directory.path / "report.html"
    reporting.write_page(page, [reporting.read_run(directory.path)])
    console.print(
        comparison.as_rich(rows, f"distance to the {config.teacher.steps}-evaluation teacher at K = {config.steps}")
    )
    console.print(
        f"solver    {directory.solver} ({directory.solver.stat().st_size / 1024:.1f} kB)\n"
        f"pictures  {directory.path}/comparison.png  schedule.png  tableau.png  history.png\n"
        f"report    {page} (opens in any browser; several runs: gas-engine report RUN RUN --out FILE)\n"
        f"sample    python -m gas_engine.sample {_model_options(config)} --solver {directory.solver} --out samples",
        soft_wrap=True,
    )


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

    Nothing for states that are no images.
    """
    if len(denoiser.shape or ()) != 3:
        return
    mine, others = rows[0], rows[1:]
    count = 12 if denoiser.decoder is not None else reporting.MOST
    states = (teacher, *(row.samples for row in rows))
    teacher, *shown = (pictures.pictures_of(denoiser, some[:count], device) for some in states)
    names = [("teacher", f"{config.teacher.steps} evaluations"), *((row.solver, row.setting) for row in rows)]
    reporting.save_samples(path.with_name(reporting.SAMPLES), names, [teacher, *shown])
    drawn = [(f"teacher, {config.teacher.steps}", teacher), (f"learned, {config.steps}", shown[0])]
    drawn += [(best.solver, samples) for best, samples in zip(others, shown[1:], strict=True)]
    drawn += [("|learned - teacher|", shown[0] - teacher)]
    drawn += [(f"|{best.solver} - teacher|", s - teacher) for best, s in zip(others, shown[1:], strict=True)]
    title = f"{denoiser.name}: {config.steps} evaluations, held-out seeds 50000 on; L1: learned {mine.l1:.4f}"
    pictures.image_rows(path, drawn, title + "".join(f", {best.solver} {best.l1:.4f}" for best in others))


def _history(directory: RunDirectory, title: str) -> None:
    """The course of times and tableau, from the rows that were written over the run."""
    lines = directory.history.read_text().splitlines() if directory.history.exists() else []
    rows = [json.loads(line) for line in lines]
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


def _version() -> str:
    from .. import __version__

    return __version__
