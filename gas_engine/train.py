"""Learn a few-step solver: ``python -m gas_engine.train --checkpoint-every 1`` trains on the embedded digits.

Writes a run directory: config, metrics, TensorBoard events, sample grids, plots of the learned times and tableau,
checkpoints, the solver itself, and at the end a table against every classical solver at the same K.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import _setup as setup
from . import comparison, pictures
from ._cli import InputError, command, console, pick_device, progress, writable
from .adapters import load_denoiser
from .denoiser import Denoiser
from .files import atomic
from .losses import distillation_loss
from .plan import as_csv
from .rollout import rollout
from .run_directory import RunDirectory
from .solvers import grid, save_solver
from .tableau import Tableau
from .teacher import TeacherSolver
from .trainer import Trainer

# What a resumed run may be given anew.
RESUMABLE = ("out", "resume", "device", "evaluation", "sample_batch")
# What a resumed run goes on with unless it is given anew: the result is the same to rounding.
MEMORY = (
    "memory_budget", "checkpoint_every", "trajectory", "offload", "carry", "micro_batch", "lean", "checkpoint_blocks",
    "loss_alone", "weights",
)  # fmt: skip


@dataclass
class Config:
    """Learn a few-step solver for a frozen diffusion or flow model."""

    model: str = "digits"
    """The embedded digits, a .safetensors EDM network, or module:factory."""
    steps: int = 4
    """Network evaluations K of the student, 1 to 32."""
    student: Literal["gs", "s4s", "linear", "belm"] = "gs"
    """gs: corrections around DPM-Solver++ theory; s4s, linear: the forms without it; belm: reversible, two states."""
    order: int | None = None
    """Highest order; K unless given."""
    loss: Literal["l1", "l2", "lpips"] = "l1"
    """Distance to the teacher's samples."""
    memory_budget: str | None = None
    """Bytes of the device for tensors, such as 8GiB: chooses what follows, down to --loss-alone, for the least time."""
    checkpoint_every: int = 1
    """At most this many network graphs are alive; 0 keeps all."""
    trajectory: Literal["keep", "offload", "reversible"] = "keep"
    """Where the states wait for the way back: on the device, in host memory, or nowhere (--student belm)."""
    offload: bool = False
    """Short for --trajectory offload."""
    carry: bool = False
    """A reversible trajectory of float64 states instead of residual codes."""
    micro_batch: int | Literal["auto"] = "auto"
    """Samples at a time within an update, with the same gradient; auto is all of them, or what the budget allows."""
    lean: bool = False
    """Keep less in the network's graph (the EDM networks do so anyway)."""
    checkpoint_blocks: Literal["none", "auto", "all"] = "none"
    """Rebuild the network block by block as well."""
    loss_alone: bool = False
    """Let no network graph wait while the loss is taken."""
    weights: Literal["resident", "int8", "streamed"] = "resident"
    """Frozen weights on the device, in eight bits there (torchao), or in host memory, brought block by block."""
    recipe: Literal["auto", "quick", "paper"] = "auto"
    """auto is quick for digits and paper for everything else."""
    iterations: int | None = None
    """Updates; the recipe's unless given."""
    batch: int | None = None
    """Samples per update; the recipe's unless given."""
    rate: float | None = None
    """Learning rate; the recipe's unless given."""
    optimizer: Literal["adam", "soap"] | None = None
    """Adam, or Adam in the eigenbasis of the gradients' covariance; the recipe's unless given."""
    ema: float | None = None
    """Decay of the average; the recipe's unless given."""
    start_grid: str | None = None
    """uniform, quadratic, logSNR, karras, or a JSON file of K+1 falling times; the recipe's unless given."""
    t_eps: float = 1e-3
    """Time at which the student stops."""
    teacher: TeacherSolver = field(default_factory=TeacherSolver)
    """The many-step solver to match."""
    train_seeds: str = "0-1399"
    """Seeds of the teacher set."""
    teacher_set: Path | None = None
    """Directory of the teacher set; made if missing. By default runs/teacher-MODEL-..."""
    out: Path | None = None
    """Run directory; by default runs/MODEL-STUDENT-kK, numbered if taken."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, bit for bit."""
    save_every: int = 200
    """Updates between checkpoints."""
    sample_every: int = 200
    """Updates between sample grids."""
    log_every: int = 20
    """Updates between rows of metrics."""
    seed: int = 0
    """Order of the batches."""
    evaluation: Literal["full", "student"] = "full"
    """At the end, compare with every classical solver, or measure the student alone."""
    sample_batch: int = 128
    """Samples at a time in everything but training."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, ..."""


def run(config: Config, given: Collection[str] = ()) -> None:
    """Train, or go on training, and compare. ``given``: options that were given, be it with their default."""
    directory, config = _open(config, given)
    device = pick_device(config.device)
    model, recipe = load_denoiser(config.model), setup.recipe(config)
    solver = setup.solver(config, model, recipe)
    execution = setup.execution(config)
    denoiser = execution.place(model, device)
    plans = setup.plans(config, model, denoiser, recipe, solver, device)
    if plans is not None:
        execution = plans.choice.execution
    assert config.out is not None
    writable(config.out.parent)
    loss = distillation_loss(config.loss, device)
    seeds, targets = setup.teacher_set(config, denoiser, device)
    start = solver.tableau(denoiser.prediction)
    trainer = Trainer(denoiser, solver, seeds, targets, loss, recipe, execution, config.seed, device)
    if plans is not None:
        trainer.cheaper = (plan.execution for plan in plans.choice.cheaper_ones())
    if config.resume:
        checkpoint = directory.restore()
        if checkpoint is not None:
            trainer.load(*checkpoint)
        directory.forget_after(trainer.step)
        console.print(f"resuming {directory.path} at update {trainer.step}", soft_wrap=True)
    else:
        directory.create(_plain(config))
    if plans is not None:
        _write(directory.path / "plan.csv", as_csv(plans))
    selection = setup.samples(denoiser, setup.SELECTION_SEEDS, config, device)
    _train(trainer, directory, config, selection)
    _finish(trainer, directory, config, selection, start)


def _train(trainer: Trainer, directory: RunDirectory, config: Config, selection: comparison.Samples) -> None:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

    began, first = time.monotonic(), trainer.step
    with SummaryWriter(str(directory.path), purge_step=first or None) as events, progress() as bar:
        task = bar.add_task("train", total=trainer.recipe.iterations, completed=first, note="")
        for step, loss in trainer:
            bar.advance(task)
            while trainer.notices:
                console.print(trainer.notices.pop(0), soft_wrap=True)
            if trainer.skipped_in_a_row:
                console.print(f"update {step}: loss or gradient not finite, skipped ({trainer.skipped} so far)")
            last = step == trainer.recipe.iterations
            if step % config.log_every == 0 or last:
                row: dict[str, Any] = {
                    "step": step, "loss": float(loss) if math.isfinite(loss) else None,
                    "rate": trainer.recipe.rate_at(step - 1),
                    "skipped": trainer.skipped, "memory_mib": round(_memory_mib(trainer.device), 1),
                    "seconds_per_update": round((time.monotonic() - began) / (step - first), 4),
                }  # fmt: skip
                meter = trainer.execution.memory.meter
                if meter is not None:
                    row["bits_lost"] = round(meter.mean, 3)
                    meter.reset()
                directory.log(row)
                for name in ("loss", "rate", "memory_mib", *(["bits_lost"] if meter is not None else [])):
                    events.add_scalar(f"train/{name}", math.nan if row[name] is None else row[name], step)
                for n, t in enumerate(trainer.solver.times().tolist()):
                    events.add_scalar(f"times/{n}", t, step)
                bar.update(task, note=f"loss {float(loss):.4f}  {row['memory_mib']:.0f} MiB")
            if step % config.sample_every == 0 or last:
                _picture(trainer, directory.path / "samples" / f"step-{step:06d}.png", selection)
            if step % config.save_every == 0 or last:
                directory.save(step, *trainer.state())


def _finish(
    trainer: Trainer, directory: RunDirectory, config: Config, selection: comparison.Samples, start: Tableau
) -> None:
    """Write the solver, measure on held-out seeds, write the table and the pictures."""
    denoiser, student, batch = trainer.denoiser, trainer.average, config.sample_batch
    tableau = student.tableau(denoiser.prediction)
    held_out = setup.samples(denoiser, setup.HELD_OUT_SEEDS, config, trainer.device)
    mine = comparison.distance(
        denoiser, tableau, held_out, f"learned ({config.student})", f"{trainer.step} updates", batch
    )  # fmt: skip
    save_solver(
        student, directory.solver, model=denoiser.name, guidance=1.0, loss=config.loss, version=_version(),
        metrics={"l1": mine.l1, "rmse": mine.rmse, "psnr": mine.psnr, "held_out_seeds": "50000-50511"},
    )  # fmt: skip
    rows = [mine]
    if config.evaluation == "full":
        with progress() as bar:
            task = bar.add_task("classical solvers", total=comparison.VARIANTS, note="")
            rows += comparison.classical_distances(
                denoiser, config.steps, selection, held_out, batch, lambda: bar.advance(task)
            )  # fmt: skip
    _write(directory.path / "comparison.md", comparison.as_markdown(rows))
    _write(directory.path / "comparison.csv", comparison.as_csv(rows))
    _compare_pictures(directory.path / "comparison.png", denoiser, config, held_out.teacher.cpu(), rows[:2])
    times = {"learned": student.times()} | {
        name: grid(name, student.schedule, config.steps, config.t_eps) for name in ("uniform", "quadratic", "logSNR")
    }
    pictures.schedule_plot(directory.path / "schedule.png", student.schedule, times, {"learned": student.told_times()})
    pictures.tableau_plot(directory.path / "tableau.png", tableau, start)
    console.print(
        comparison.as_rich(rows, f"distance to the {config.teacher.steps}-evaluation teacher at K = {config.steps}")
    )
    console.print(
        f"solver    {directory.solver} ({directory.solver.stat().st_size / 1024:.1f} kB)\n"
        f"pictures  {directory.path}/comparison.png  schedule.png  tableau.png\n"
        f"sample    python -m gas_engine.sample --model {config.model} --solver {directory.solver} --out samples",
        soft_wrap=True,
    )


def _compare_pictures(
    path: Path, denoiser: Denoiser, config: Config, teacher: Tensor, rows: list[comparison.Distance]
) -> None:
    """Teacher, student and the best classical solver above their errors; nothing for states that are no images."""
    if len(denoiser.shape or ()) != 3:
        return
    mine, others = rows[0], rows[1:]
    drawn = [(f"teacher, {config.teacher.steps}", teacher), (f"learned, {config.steps}", mine.samples)]
    drawn += [(best.solver, best.samples) for best in others]
    drawn += [("|learned - teacher|", mine.samples - teacher)]
    drawn += [("|classical - teacher|", best.samples - teacher) for best in others]
    title = f"{denoiser.name}: {config.steps} evaluations, held-out seeds 50000 on; L1 {mine.l1:.4f}"
    pictures.image_rows(path, drawn, title + "".join(f" against {best.l1:.4f}" for best in others))


def _open(config: Config, options: Collection[str]) -> tuple[RunDirectory, Config]:
    """The run directory and the configuration that counts: the stored one if resuming."""
    for name in ("save_every", "sample_every", "log_every", "sample_batch"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    setup.execution(config)
    if config.out is None:
        stem = f"runs/{Path(config.model).stem.replace(':', '-')}-{config.student}-k{config.steps}"
        taken = [Path(stem), *(Path(f"{stem}-{n}") for n in range(2, 10_000))]
        free = next(i for i, path in enumerate(taken) if not RunDirectory(path).exists())
        config = dataclasses.replace(config, out=taken[max(0, free - 1) if config.resume else free])
    assert config.out is not None
    directory = RunDirectory(config.out)
    if not config.resume:
        if directory.exists():
            directory.create({})  # refuses, before any work is done
        return directory, config
    stored, given, default = directory.config(), _plain(config), _plain(Config())
    anew = {name for name in MEMORY if name in options or given[name] != default[name]}
    if anew & {*setup.CHOSEN, "checkpoint_every"} and "memory_budget" not in anew:
        stored["memory_budget"] = None  # what it chose is chosen by hand now
    for name, value in given.items():
        free = name in RESUMABLE or (name in MEMORY and "int8" not in (value, stored.get(name)))
        if not free and value != default[name] and value != stored.get(name):
            raise InputError(
                f"--resume continues with {name}={stored.get(name)!r} from {directory.path}/config.json, but "
                f"{name}={value!r} was given; leave it out, or start a new run"
            )
    kept = {name: getattr(config, name) for name in RESUMABLE}
    kept |= {name: given[name] for name in anew}
    try:
        stored["teacher"] = TeacherSolver(**stored["teacher"])
        stored["teacher_set"] = stored["teacher_set"] and Path(stored["teacher_set"])
        return directory, Config(**{**stored, **kept})
    except (KeyError, TypeError) as error:
        raise InputError(f"{directory.path}/config.json is not one of this version ({error})") from None


@torch.no_grad()
def _picture(trainer: Trainer, path: Path, data: comparison.Samples) -> None:
    if len(trainer.denoiser.shape or ()) != 3:
        return
    shown = slice(0, 12)
    cond = None if data.cond is None else data.cond[shown]
    student = rollout(
        trainer.denoiser, data.noise[shown], trainer.average.tableau(trainer.denoiser.prediction), cond
    ).cpu()
    teacher = data.teacher[shown].cpu()
    rows = [("teacher", teacher), ("student", student), ("|difference|", student - teacher)]
    pictures.image_rows(path, rows, f"{trainer.step} updates")


def _memory_mib(device: torch.device) -> float:
    """Peak memory: of torch's allocator on a GPU, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _plain(config: Config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _version() -> str:
    from . import __version__

    return __version__


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``gas-engine train``."""
    words = sys.argv[1:] if argv is None else argv
    given = {word.lstrip("-").partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    command("train", Config, functools.partial(run, given=given), argv)


if __name__ == "__main__":
    main()
