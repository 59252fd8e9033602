"""The student that ``train``'s options name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._cli import InputError
from ..conditioning import Range
from ..denoiser import Denoiser
from ..guidance import parse_guidance
from ..solvers import FAMILIES, GRIDS, AnyStepsSolver, LearnedTimes, load_solver
from .recipe import Recipe

if TYPE_CHECKING:
    from .options import Config


def steps_range(config: Config) -> range:
    """The K that --steps names: 6 is one, 4-10 are seven."""
    low, dash, high = str(config.steps).partition("-")
    try:
        found = range(int(low), int(high if dash else low) + 1)
    except ValueError:
        found = range(0)
    if not found:
        raise InputError(f"--steps must be a number such as 6, or a rising range such as 4-10, got {config.steps!r}")
    return found


def guidance_range(config: Config) -> Range | None:
    """The scales of --guidance that the student's tables are functions of; None where they are the same for all."""
    scale = parse_guidance(config.guidance) if config.guidance else None
    if not isinstance(scale, tuple):
        if config.same_at_every_scale:
            raise InputError("--same-at-every-scale is of a range, such as --guidance 2:9; leave it out")
        return None
    able = _of_full_order(config) and steps_range(config)[0] > 1
    return scale if able and not config.same_at_every_scale else None


def _of_full_order(config: Config) -> bool:
    return config.student == "gs" and config.order is None and config.form in (None, "theory")


def new_solver(config: Config, denoiser: Denoiser, recipe: Recipe) -> LearnedTimes:
    """The student before its first update."""
    counts = steps_range(config)
    steps = counts[-1]
    if len(counts) == 1 and config.degree is not None:
        raise InputError(f"--degree {config.degree} is of a range of K, such as --steps 4-10; leave it out")
    if len(counts) > 1 or guidance_range(config) is not None:
        return _begun(config, denoiser, _any_steps(config, denoiser, recipe, counts))
    start: str | Tensor = recipe.start_grid
    if recipe.start_grid not in GRIDS:
        try:
            start = torch.tensor(json.loads(Path(recipe.start_grid).read_text()), dtype=torch.float64)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"--start-grid must be {', '.join(GRIDS)} or a JSON file of {steps + 1} falling times, "
                f"got {recipe.start_grid!r} ({error})"
            ) from None
    student = FAMILIES[config.student]
    asked = {"order": config.order, "base": config.base, "theory": config.form}
    given = {name: value for name, value in asked.items() if value is not None}
    alien = next((name for name in given if name not in student.settings), None)
    if alien is not None:
        option = "form" if alien == "theory" else alien
        raise InputError(f"--student {config.student} takes no --{option}, got {given[alien]}; leave it out")
    return _begun(config, denoiser, student(steps, denoiser.schedule, config.t_eps, start=start, **given))


def _any_steps(config: Config, denoiser: Denoiser, recipe: Recipe, counts: range) -> AnyStepsSolver:
    """The student of a range of K, of guidance scales, or of both, before its first update."""
    if not _of_full_order(config):
        raise InputError(
            f"--steps {config.steps} is of --student gs without --order and --form; give one K, or leave those out"
        )
    if recipe.start_grid not in GRIDS:
        of, option = ("K", f"--steps {config.steps}") if len(counts) > 1 else ("scale", f"--guidance {config.guidance}")
        raise InputError(
            f"--start-grid {recipe.start_grid} has the times of one {of}, and {option} needs those of each; "
            f"give {', '.join(GRIDS)}"
        )
    return AnyStepsSolver(
        counts, denoiser.schedule, config.t_eps, recipe.start_grid, config.base or "dpmpp3m", config.degree,
        guidance_range(config),
    )  # fmt: skip


def _begun(config: Config, denoiser: Denoiser, new: LearnedTimes) -> LearnedTimes:
    """The new solver, or the one of --start-from, which must be of its kind."""
    if config.start_from is None:
        return new
    found = load_solver(config.start_from, denoiser.schedule, config.t_eps, denoiser.name)
    mine, theirs = new.config(), found.config()
    differing = [name for name in mine | theirs if mine.get(name) != theirs.get(name) and name != "start"]
    if differing:
        name = differing[0]
        raise InputError(
            f"--start-from {config.start_from} is a solver with {name}={theirs.get(name)!r}, and the run is to "
            f"have {mine.get(name)!r}; give the options that it was trained with"
        )
    return found
