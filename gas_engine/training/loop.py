"""The loop of a run: updates, rows of metrics, sample grids, checkpoints."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from typing import Any

import torch

from .. import comparison, pictures
from .._cli import console, progress
from ..rollout import rollout
from .directory import RunDirectory
from .options import Config
from .trainer import Trainer


def train(trainer: Trainer, directory: RunDirectory, config: Config, selection: comparison.Samples) -> None:
    began, first = time.monotonic(), trainer.step
    with _events(directory, first) as events, progress() as bar:
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
                _picture(trainer, directory, f"step-{step:06d}.png", selection)
            if step % config.save_every == 0 or last:
                tensors, numbers = trainer.state()
                trainer.group.check_same(tensors, f"update {step}")
                directory.save(step, tensors, numbers)


class _NoEvents:
    """Events of a process that writes none."""

    def add_scalar(self, *_: Any) -> None: ...


def _events(directory: RunDirectory, first: int) -> Any:
    if not directory.writes:
        return contextlib.nullcontext(_NoEvents())
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

    return SummaryWriter(str(directory.path), purge_step=first or None)


@torch.no_grad()
def _picture(trainer: Trainer, directory: RunDirectory, name: str, data: comparison.Samples) -> None:
    if len(trainer.denoiser.shape or ()) != 3:
        return
    shown = slice(0, 12)
    cond = None if data.cond is None else data.cond[shown]
    student = rollout(
        trainer.denoiser, data.noise[shown], trainer.average.tableau(trainer.denoiser.prediction), cond
    ).cpu()
    if not directory.writes:
        return
    teacher = data.teacher[shown].cpu()
    rows = [("teacher", teacher), ("student", student), ("|difference|", student - teacher)]
    pictures.image_rows(directory.path / "samples" / name, rows, f"{trainer.step} updates")


def _memory_mib(device: torch.device) -> float:
    """Peak memory: of torch's allocator on a GPU, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
