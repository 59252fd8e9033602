"""The loop of a run: updates, measurements, rows of metrics, sample grids, checkpoints, and going back to one."""

from __future__ import annotations

import math
import resource
import time
from functools import partial
from typing import Any

import torch

from .. import comparison, pictures
from .._cli import InputError, console, progress
from ..solvers import save_solver
from . import course
from .directory import Checkpoint, RunDirectory
from .loggers import logger
from .options import Config, plain
from .stop import Stop
from .trainer import NotFinite, Trainer


def train(trainer: Trainer, directory: RunDirectory, config: Config, selection: comparison.Samples) -> None:
    """Update to the recipe's end, or to that of ``config.patience``; SystemExit where a signal asks for it."""
    began, first, updates, asked = time.monotonic(), trainer.step, 0, False
    with (
        logger(config.logger if directory.writes else "none", directory.path, plain(config), first) as write,
        Stop() as stop,
        progress() as bar,
    ):
        task = bar.add_task("train", total=trainer.recipe.iterations, completed=first, note="")
        if not first:
            _save(trainer, directory, config, None, last=False)  # a state to go back to
            if not directory.history.exists():
                directory.attempt("the history", partial(_log_history, trainer, directory))
        while not trainer.finished:
            try:
                course.update(trainer, directory)
            except NotFinite as error:
                _go_back(trainer, directory, config, error)
                continue
            finally:
                _say_notices(trainer)
            step, updates, asked = trainer.step, updates + 1, trainer.group.any(stop.asked is not None)
            if trainer.skipped_in_a_row:
                console.print(f"update {step}: loss or gradient not finite, skipped ({trainer.skipped} so far)")
            row: dict[str, Any] = {}
            distance = None
            if config.evaluate_every and (step % config.evaluate_every == 0 or trainer.finished):
                distance = measure(trainer, directory, config, selection)
                row["distance"] = distance
            last = trainer.finished
            if step % config.log_every == 0 or last:
                row |= _metrics(trainer)
                row["seconds_per_update"] = round((time.monotonic() - began) / updates, 4)
                bar.update(task, note=f"loss {row['loss'] or math.nan:.4f}  {row['memory_mib']:.0f} MiB")
            bar.update(task, completed=step)
            if row:
                directory.attempt("metrics", partial(directory.log, {"step": step, **row}))
                times = {f"times/{n}": t for n, t in enumerate(trainer.solver.times().tolist())}
                write(step, row | times)
                directory.attempt("the history", partial(_log_history, trainer, directory))
            if config.pictures and (step % config.sample_every == 0 or last):
                _sample_grid(trainer, directory, selection)
            # A state from which updates are skipped is none to go back to.
            if (step % config.save_every == 0 and not trainer.skipped_in_a_row) or last or asked:
                _save(trainer, directory, config, distance, last)
            if asked:
                break
    if trainer.group.any(stop.asked is not None) or asked:  # also if it came while the last state was written
        console.print(
            f"{stop.name}: stopped after update {trainer.step}; go on with --out {directory.path} --resume",
            soft_wrap=True,
        )
        raise SystemExit(stop.exit_code)
    if trainer.best.patience and trainer.best.tensors:
        trainer.average.load_state_dict(trainer.best.tensors)
        console.print(
            f"the solver is the average of update {trainer.best.step}, the nearest to the teacher "
            f"({trainer.best.distance:.4f}) of {trainer.step} updates",
            soft_wrap=True,
        )


def resume(trainer: Trainer, directory: RunDirectory, config: Config, checkpoint: Checkpoint | None) -> None:
    """Set trainer and directory to a checkpoint, or to where the run began."""
    if checkpoint is not None:
        trainer.load(*checkpoint)
    directory.forget_after(trainer.step)
    best = partial(_write_best, trainer, directory, config)
    # What is there may be of updates that are taken back.
    directory.attempt("the best solver", best if trainer.best.tensors else partial(directory.best.unlink, True))


def measure(trainer: Trainer, directory: RunDirectory, config: Config, selection: comparison.Samples) -> float | None:
    """L1 distance of the averaged solver to the teacher on the selection seeds, None if not finite; keeps the best.

    Of a solver of several K, the geometric mean. Draws nothing that training draws: an update seeds its own generators.
    """
    found = [
        comparison.distance(trainer.denoiser, solver, selection, "", batch=config.sample_batch, group=trainer.group)
        for solver in (comparison.solver_for(trainer.average, k, trainer.denoiser) for k in trainer.average.steps_range)
    ]
    trainer.notices += trainer.watch.samples(found[-1].samples, selection.teacher.cpu())
    distance = comparison.mean_l1(found)
    if trainer.best.see(trainer.step, distance, trainer.average):
        directory.attempt("the best solver", partial(_write_best, trainer, directory, config))
    return distance if math.isfinite(distance) else None


def _go_back(trainer: Trainer, directory: RunDirectory, config: Config, error: NotFinite) -> None:
    """Back to the newest checkpoint before the updates that were skipped, with half the rate; or no further."""
    first, rollbacks, skipped = trainer.first_skipped, trainer.rollbacks, trainer.skipped
    found = None
    if rollbacks < trainer.recipe.max_rollbacks:
        # The one at the first of them is of no use: it would see them again.
        found = trainer.group.first(lambda: directory.restore(first, config.save_every, strict=False))
    if found is None:
        raise error
    resume(trainer, directory, config, found)
    trainer.rollbacks, trainer.skipped = rollbacks + 1, skipped
    console.print(
        f"update {first + 1} and what followed were not finite: back at update {trainer.step} with half the rate "
        f"({trainer.rollbacks} of {trainer.recipe.max_rollbacks} times)",
        soft_wrap=True,
    )


def _save(trainer: Trainer, directory: RunDirectory, config: Config, distance: float | None, last: bool) -> None:
    """A checkpoint. One that cannot be written is tried again at the next; the last one must be."""

    tensors, numbers = trainer.state()
    trainer.group.check_same(tensors, f"update {trainer.step}")

    def save() -> None:
        directory.save(trainer.step, tensors, numbers, config.keep, config.save_every, distance)

    if not last:
        directory.attempt("checkpoints", save)
        return
    try:
        save()
    except OSError as error:
        raise InputError(
            f"the last checkpoint could not be written to {directory.path} ({error.strerror or error}); make room and "
            f"go on with --out {directory.path} --resume"
        ) from None


def _metrics(trainer: Trainer) -> dict[str, Any]:
    """The columns of a row, means over the updates since the last; here the host reads them, and nowhere else."""
    means, meter = trainer.means.read(trainer.group), trainer.execution.memory.meter
    row: dict[str, Any] = {
        "loss": means["distillation"] + means.get("adversarial", 0.0) if "distillation" in means else None,
        "rate": trainer.rate_at(trainer.step - 1), "skipped": trainer.skipped, "rollbacks": trainer.rollbacks,
        "memory_mib": round(_memory_mib(trainer.device), 1),
    }  # fmt: skip
    if meter is not None:
        row["bits_lost"] = round(meter.mean, 3)
        meter.reset()
    watch, step, adversary = trainer.watch, trainer.step, trainer.adversary
    if "distillation" in means:
        trainer.notices += watch.losses(step, means["distillation"], means.get("adversarial"))
    trainer.notices += watch.times(trainer.solver.times(), trainer.solver.schedule)
    if adversary is None:
        return row
    if adversary.logits is not None:
        trainer.notices += watch.logits(adversary.logits)
    if means.get("d_skipped"):
        trainer.notices.append(
            f"update {step}: {means['d_skipped']:.0%} of the discriminator's steps were not finite and left out; lower "
            f"--discriminator-rate ({adversary.settings.rate:g})"
        )
    return row | means


def _log_history(trainer: Trainer, directory: RunDirectory) -> None:
    """The averaged solver in numbers, a row for each K, from which its course is drawn."""
    for one in trainer.average.each():
        tableau = one.tableau(trainer.denoiser.prediction)
        numbers = {"times": one.times(), "told": tableau.t_net, "A": tableau.A, "B": tableau.B}
        row = {name: value.detach().tolist() for name, value in numbers.items()}
        directory.log({"step": trainer.step, **row}, directory.history)


def _say_notices(trainer: Trainer) -> None:
    while trainer.notices:
        console.print(trainer.notices.pop(0), soft_wrap=True)


def _write_best(trainer: Trainer, directory: RunDirectory, config: Config) -> None:
    best, solver = trainer.best, type(trainer.average).from_config(trainer.average.config())
    solver.load_state_dict(best.tensors)
    facts = {"prediction": trainer.denoiser.prediction, "guidance": 1.0} | trainer.denoiser.facts()
    save_solver(
        solver, directory.best, model=trainer.denoiser.name, **facts, loss=config.loss,
        metrics={"l1": best.distance, "updates": best.step, "selection_seeds": f"40000-{39_999 + config.selection}"},
    )  # fmt: skip


@torch.no_grad()
def _sample_grid(trainer: Trainer, directory: RunDirectory, data: comparison.Samples) -> None:
    if len(trainer.denoiser.shape or ()) != 3 or not (directory.writes or trainer.group.lockstep):
        return
    shown = slice(0, 12)
    solver = comparison.solver_for(trainer.average, trainer.average.steps, trainer.denoiser)
    student = data.run(trainer.denoiser, solver, shown)
    both = (student, data.teacher[shown].cpu())
    student, teacher = (pictures.pictures_of(trainer.denoiser, states, trainer.device) for states in both)
    rows = [("teacher", teacher), ("student", student), ("|difference|", student - teacher)]
    path = directory.path / "samples" / f"step-{trainer.step:06d}.png"
    directory.attempt("sample grids", lambda: pictures.image_rows(path, rows, f"{trainer.step} updates"))


def _memory_mib(device: torch.device) -> float:
    """Peak memory: of torch's allocator on a GPU, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
