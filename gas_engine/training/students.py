"""The student that ``train``'s options name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._cli import InputError
from ..denoiser import Denoiser
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


def new_solver(config: Config, denoiser: Denoiser, recipe: Recipe) -> LearnedTimes:
    """The student before its first update."""
    counts = steps_range(config)
    steps = counts[-1]
    if len(counts) > 1:
        return _begun(config, denoiser, _any_steps(config, denoiser, recipe, counts))
    if config.degree is not None:
        raise InputError(f"--degree {config.degree} is of a range of K, such as --steps 4-10; leave it out")
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
    """The student of a range of K before its first update."""
    if config.student != "gs" or config.order is not None or config.form not in (None, "theory"):
        raise InputError(
            f"--steps {config.steps} is of --student gs without --order and --form; give one K, or leave those out"
        )
    if recipe.start_grid not in GRIDS:
        raise InputError(
            f"--start-grid {recipe.start_grid} has the times of one K, and --steps {config.steps} needs those of each; "
            f"give {', '.join(GRIDS)}"
        )
    base = config.base or "dpmpp3m"
    return AnyStepsSolver(counts, denoiser.schedule, config.t_eps, recipe.start_grid, base, config.degree)


def _begun(config: Config, denoiser: Denoiser, new: LearnedTimes) -> LearnedTimes:
    """The new solver, or the one of --start-from, which must be of its kind."""
    if config.start_from is None:
        return new
    found = load_solver(config.start_from, denoiser.schedule, config.t_eps, denoiser.name)
    differing = [name for name, value in new.config().items() if found.config().get(name) != value and name != "start"]
    if differing:
        name = differing[0]
        raise InputError(
            f"--start-from {config.start_from} is a solver with {name}={found.config().get(name)!r}, and the run is to "
            f"have {new.config()[name]!r}; give the options that it was trained with"
        )
    return found
