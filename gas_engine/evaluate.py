"""Measure solvers: ``gas-engine evaluate --model digits --solver runs/A classical --steps 4,6 --out DIR``.

Every solver and number of evaluations becomes a row of ``evaluation.csv``: its distances to the teacher, Frechet and
kernel distances, precision and recall, diversity and fine detail. What is measured of 1,024 samples is a file under
DIR/measured, named by a checksum of all that it depends on: an evaluation that was killed, or is called with more
solvers, measures what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ._cli import InputError, command, console, parse_seeds, progress, writable
from .candidates import Candidate, Choice, candidates, open_choices
from .denoiser import Denoiser
from .distributed import Group
from .losses.perceptual import NETWORKS, Perceptual
from .measuring import PART, Measuring
from .metrics.features import Extractor, features_of, torchscript_features
from .metrics.inception import inception_features, inception_weights
from .metrics.meter import METRICS, OF_FEATURES, Measured, Meter, Yardstick, sums
from .metrics.reference import Reference, open_reference
from .metrics.tables import Row, write
from .models import PlacedModelOptions, open_model, place
from .pictures import can_draw, pictures_of
from .teacher import TeacherSolver, make_teacher_set
from .training.setup import SELECTION_SEEDS


@dataclass
class Config(PlacedModelOptions):
    """Measure solvers, going on where an earlier call was stopped."""

    solver: Annotated[tuple[str, ...], tyro.conf.arg(metavar="S ...")] = ("classical",)
    """Run directories, solver files, names of classical solvers, or classical: of every family the best variant, grid
    and t_eps for each number of evaluations, as chosen on seeds of their own."""
    steps: str | None = None
    """Network evaluations, such as 4,6 or 4-10; those of the files unless given, or 4,6,8,10."""
    grid: str = "quadratic"
    """Times of a classical solver that is given by name."""
    t_eps: float | None = None
    """Where it stops; the model's unless given."""
    teacher: TeacherSolver = field(default_factory=TeacherSolver)
    """The many-step solver to measure against."""
    seeds: str = "50000-50511"
    """Seeds to measure on, which no solver was trained or chosen on."""
    selection: int = 64
    """Seeds that the best of the classical solvers are chosen on, at most 64."""
    reference: str = "auto"
    """data (of an embedded model), a directory of images, an .npz of statistics (EDM's, ADM's); auto: data or none."""
    features: str = "auto"
    """auto, inception, none, or a TorchScript FILE.pt from images [N, C, H, W] in [-1, 1] to [N, F]: a program, which
    will be run."""
    metrics: str = "all"
    """Columns to fill, such as l1,lpips,fd_data; all is those for which everything is at hand."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = field(default=Path("evaluation"))
    """Directory of the tables, of the teacher's samples and of what was measured."""
    batch: int = 128
    """Samples at a time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, ..."""


def run(config: Config) -> Path:
    """Measure and write; return the path of the table."""
    if config.batch < 1:
        raise InputError(f"--batch must be at least 1, got {config.batch}")
    if not 1 <= config.selection <= len(SELECTION_SEEDS):
        raise InputError(f"--selection must be 1 to {len(SELECTION_SEEDS)}, got {config.selection}")
    wanted = _wanted(config)
    with Group.from_environment() as group:
        device = group.device(config.device)
        denoiser = place(config, open_model(config), device)
        teacher = config.teacher.on(denoiser.schedule)
        seeds = parse_seeds(config.seeds)
        choices = open_choices(config.solver, config.steps, denoiser, config.grid, config.t_eps)
        _check_seeds(config.seeds, seeds, choices)
        shape = _picture_shape(denoiser, device)
        notes: list[str] = []
        reference = _reference(config, denoiser, shape, notes)
        extractor = _extractor(config, denoiser, shape, wanted, device, notes)
        perceptual = _perceptual(config, wanted, shape, device, notes)
        meter = Meter(extractor, perceptual, "sfid" in wanted and reference is not None)
        out = writable(config.out)
        make_teacher_set(
            denoiser, seeds, teacher, out / "teacher", batch=config.batch, shard=PART, device=device, group=group
        )  # fmt: skip
        measuring = Measuring(denoiser, seeds, meter, teacher, out, config.batch, device, group)
        selection = SELECTION_SEEDS[: config.selection]
        found = candidates(choices, denoiser, teacher, selection, out / "chosen.json", config.batch, device, group)
        rows, data = _rows(measuring, found, reference, wanted)
        if group.main:
            write(out, rows, data, denoiser.name, teacher.steps, wanted, shape)
            for note in notes:
                console.print(f"note      {note}", soft_wrap=True)
        return out / "evaluation.csv"


def _rows(
    measuring: Measuring, found: list[Candidate], reference: Reference | None, wanted: Sequence[str]
) -> tuple[list[Row], Measured | None]:
    """A row for every candidate, and one for the teacher at the end; the data's measurement."""
    count = len(measuring.seeds)
    with progress() as bar:
        total = (1 + len(found)) * count + (reference.count if reference else 0)
        task, done = bar.add_task("evaluate", total=total, note=""), 0

        def advance(n: int) -> None:
            bar.advance(task, n)

        def finished(n: int) -> None:
            nonlocal done
            done += n
            bar.update(task, completed=done)  # with what other ranks did, or the disk held

        data = measuring.data(reference, advance) if reference else None
        finished(reference.count if reference else 0)
        of_teacher = measuring.measured(None, advance)
        finished(count)
        yardstick = Yardstick.of(of_teacher, data, reference)
        rows = []
        for candidate in found:
            bar.update(task, note=f"{candidate.name}, {candidate.steps}")
            measured = measuring.measured(candidate, advance)
            finished(count)
            scores = yardstick.scores(measured, wanted) if measuring.group.main else {}
            rows.append(Row(candidate.name, candidate.setting, candidate.steps, scores, sums(measured)))
        solver = measuring.teacher
        setting = f"{solver.solver}, {solver.grid}, {solver.t_eps:g}"
        scores = yardstick.scores(of_teacher, wanted) if measuring.group.main else {}
        return [*rows, Row("teacher", setting, solver.steps, scores, sums(of_teacher))], data


def _wanted(config: Config) -> list[str]:
    if config.metrics == "all":
        own = Path(config.features).suffix in (".pt", ".pth")
        return [name for name in METRICS if name != "cmmd" or own]  # a width that is CLIP's means little elsewhere
    asked = [name.strip() for name in config.metrics.split(",")]
    unknown = [name for name in asked if name not in METRICS]
    if unknown:
        raise InputError(f"--metrics has no {unknown[0]!r}; it is all, or some of {', '.join(METRICS)}")
    return [name for name in METRICS if name in asked]


def _check_seeds(text: str, seeds: list[int], choices: Sequence[Choice]) -> None:
    """Raises InputError where a solver was chosen or trained on a seed."""
    if {*seeds} & {*SELECTION_SEEDS}:
        first, last = SELECTION_SEEDS[0], SELECTION_SEEDS[-1]
        raise InputError(f"--seeds {text} has some of {first}-{last}, which solvers are chosen on; leave them out")
    for choice in choices:
        if {*seeds} & {*choice.train_seeds}:
            raise InputError(f"--seeds {text} has some that {choice.name} was trained on; give others")


def _picture_shape(denoiser: Denoiser, device: torch.device) -> tuple[int, ...] | None:
    """[C, H, W] of pictures, or None for states that are none."""
    if len(denoiser.shape or ()) != 3:
        return None
    can_draw(denoiser)
    return tuple(pictures_of(denoiser, torch.zeros(1, *(denoiser.shape or ())), device).shape[1:])


def _reference(config: Config, denoiser: Denoiser, shape: tuple[int, ...] | None, notes: list[str]) -> Reference | None:
    if shape is None:
        if config.reference != "auto":
            raise InputError(f"--reference is of pictures, and {denoiser.name} makes none; leave it out")
        return None
    try:
        return open_reference("data" if config.reference == "auto" else config.reference, denoiser.name, shape)
    except ValueError as error:
        if config.reference != "auto":
            raise
        notes.append(f"{error}; the columns of the data stay empty")
        return None


def _extractor(
    config: Config, denoiser: Denoiser, shape: tuple[int, ...] | None, wanted: Sequence[str], device: torch.device,
    notes: list[str],
) -> Extractor | None:  # fmt: skip
    if config.features == "none" or not {*OF_FEATURES, "sfid", "cmmd"} & {*wanted}:
        return None
    if shape is None:
        notes.append(f"{denoiser.name} makes no pictures, so the columns of features stay empty")
        return None
    if config.features == "inception":
        return inception_features(device)
    if config.features != "auto":
        return torchscript_features(config.features, device)
    embedded = features_of(denoiser.name)
    if embedded is not None:
        return embedded
    try:
        return inception_features(device)
    except ValueError as error:
        notes.append(f"{error}; or give --features FILE.pt: until then the columns of features stay empty")
        return None


def _perceptual(
    config: Config, wanted: Sequence[str], shape: tuple[int, ...] | None, device: torch.device, notes: list[str]
) -> Perceptual | None:
    if "lpips" not in wanted:
        return None
    if config.metrics != "all":
        return Perceptual("lpips", device)
    file = inception_weights().with_name(NETWORKS["lpips"][2])
    if shape is None or shape[0] not in (1, 3) or not file.is_file():
        if shape is not None:
            notes.append(f"lpips stays empty without {file}; --metrics lpips fetches it (528 MB)")
        return None
    return Perceptual("lpips", device)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``gas-engine evaluate``."""
    command("evaluate", Config, run, argv)


if __name__ == "__main__":
    main()
