"""What a run trains on: the teacher's samples of its seeds, or a published set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._cli import InputError, parse_seeds
from ..adapters.published import read_published_teacher_set
from ..denoiser import Denoiser
from ..distributed import ALONE, Group
from ..teacher import load_teacher_set, make_teacher_set
from .options import Config
from .setup import HELD_OUT_SEEDS, SELECTION_SEEDS


def teacher_set(
    config: Config, denoiser: Denoiser, device: torch.device, group: Group = ALONE
) -> tuple[list[int], Tensor, tuple[Tensor, Any] | None]:
    """Training seeds and the teacher's samples for them, made where they are missing.

    Of a published set, in a file, the seeds say which rows; its noise and conditions come third.
    """
    seeds = parse_seeds(config.train_seeds)
    if config.teacher_set is not None and config.teacher_set.is_file():
        return published_set(config.teacher_set, denoiser, seeds)
    if {*SELECTION_SEEDS, *HELD_OUT_SEEDS} & {*seeds}:
        raise InputError(
            f"training seeds must leave 40000-40063 and 50000-50511 for evaluation, got {config.train_seeds}"
        )
    teacher = config.teacher
    name = f"teacher-{Path(config.model).stem.replace(':', '-')}-{teacher.solver}-{teacher.steps}-{teacher.grid}"
    name += f"-{config.weights}" if config.weights in ("int8", "nf4") else ""
    name += f"-g{denoiser.guidance}" if isinstance(denoiser.guidance, float) and denoiser.guidance != 1 else ""
    name += "-g{:g}-{:g}".format(*denoiser.guidance) if isinstance(denoiser.guidance, tuple) else ""
    name += f"-{Path(config.prompts).stem[:40]}" if config.prompts else ""
    name += f"-{config.precision}" if config.precision != "fp32" else ""
    out = config.teacher_set or Path("runs") / name
    make_teacher_set(denoiser, seeds, teacher, out, batch=config.sample_batch, device=device, group=group)
    found, samples = load_teacher_set(out)
    row = {seed: i for i, seed in enumerate(found)}
    return seeds, samples[[row[seed] for seed in seeds]], None


def own_prompts(config: Config) -> list[str] | None:
    """Those of a published teacher set, which a text model is told where no others are given."""
    if config.prompts is not None or config.teacher_set is None or not config.teacher_set.is_file():
        return None
    cond = read_published_teacher_set(config.teacher_set).cond
    return cond if isinstance(cond, list) else None


def published_set(path: Path, denoiser: Denoiser, rows: list[int]) -> tuple[list[int], Tensor, tuple[Tensor, Any]]:
    """Rows of a published teacher set: their numbers, samples, and noise with conditions."""
    found = read_published_teacher_set(path)
    if max(rows) >= len(found):
        raise InputError(f"{path} has {len(found)} rows; --train-seeds names row {max(rows)}")
    if tuple(found.samples.shape[1:]) != denoiser.shape:
        raise InputError(
            f"{path} holds samples of shape {list(found.samples.shape[1:])}, but {denoiser.name} makes "
            f"{list(denoiser.shape or ())}"
        )
    if isinstance(denoiser.guidance, tuple):
        raise InputError(f"{path} was made at one scale of guidance; give that, not a range")
    return rows, found.samples[rows], (found.noise[rows], _conditions(path, found.cond, denoiser, rows))


def _conditions(path: Path, cond: Tensor | list[str] | None, denoiser: Denoiser, rows: list[int]) -> Any:
    """Classes of the rows, or the conditioning of their prompts; checked against what the model takes."""
    conditioning, classes = denoiser.conditioning, denoiser.classes
    if isinstance(cond, list):
        if conditioning is None or classes:
            raise InputError(f"{path} holds prompts, and {denoiser.name} takes none")
        return conditioning.of([cond[row] for row in rows])
    if cond is None:
        if conditioning is not None:
            raise InputError(f"{path} holds no conditions, and {denoiser.name} needs them")
        return None
    if not classes:
        raise InputError(f"{path} holds classes, and {denoiser.name} takes none")
    if int(cond.max()) >= classes:
        raise InputError(f"{path} holds class {int(cond.max())}; those of {denoiser.name} run from 0 to {classes - 1}")
    return cond[rows]
