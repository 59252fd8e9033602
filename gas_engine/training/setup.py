"""What ``train`` builds from its options."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import comparison
from .._cli import InputError, console, parse_seeds, progress
from ..denoiser import Denoiser, seeded
from ..execution import BLOCKS, Execution
from ..memory import BitsLost, MemoryPolicy
from ..planner import Plans, parse_bytes, plan, show_bytes
from ..solvers import GRIDS, BELMSolver, GeneralizedSolver, LearnedTimes
from ..teacher import load_teacher_set, make_teacher_set, teacher_samples
from .recipe import RECIPES, Recipe

if TYPE_CHECKING:
    from .options import Config

SELECTION_SEEDS = range(40_000, 40_064)
HELD_OUT_SEEDS = range(50_000, 50_512)
# What a memory budget chooses.
CHOSEN = ("trajectory", "offload", "carry", "micro_batch", "lean", "checkpoint_blocks", "loss_alone")
FORMS: dict[str, bool | str] = {"gs": True, "s4s": False, "linear": "linear"}


def recipe(config: Config) -> Recipe:
    """The recipe by its name, and what was given instead of its values."""
    name = config.recipe if config.recipe != "auto" else ("quick" if config.model == "digits" else "paper")
    given = {k: getattr(config, k) for k in ("iterations", "batch", "rate", "optimizer", "ema", "start_grid")}
    found = dataclasses.replace(RECIPES[name], **{k: v for k, v in given.items() if v is not None})
    if found.iterations < 1 or found.batch < 1 or found.rate <= 0 or not 0 <= found.ema < 1:
        raise InputError(f"iterations and batch must be at least 1, rate above 0 and ema in [0, 1), got {found}")
    return found


def solver(config: Config, denoiser: Denoiser, recipe: Recipe) -> LearnedTimes:
    """The student before its first update."""
    start: str | Tensor = recipe.start_grid
    if recipe.start_grid not in GRIDS:
        try:
            start = torch.tensor(json.loads(Path(recipe.start_grid).read_text()), dtype=torch.float64)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"--start-grid must be {', '.join(GRIDS)} or a JSON file of {config.steps + 1} falling times, "
                f"got {recipe.start_grid!r} ({error})"
            ) from None
    if config.student == "belm":
        if config.order is not None:
            raise InputError(f"--student belm is of second order and takes no --order, got {config.order}")
        return BELMSolver(config.steps, denoiser.schedule, config.t_eps, start)
    return GeneralizedSolver(
        config.steps, denoiser.schedule, config.t_eps, config.order, theory=FORMS[config.student], start=start
    )


def execution(config: Config) -> Execution:
    """How updates run, as the options say; a budget says it instead."""
    where = "offload" if config.offload else config.trajectory
    if config.offload and config.trajectory == "reversible":
        raise InputError("--offload and --trajectory reversible are two places for the states; leave one out")
    if where == "reversible" and config.student != "belm":
        raise InputError(
            f"--trajectory reversible needs a student whose states can be walked back to, and {config.student} has a "
            "full history; use --student belm, or --trajectory offload"
        )
    given = [name for name in CHOSEN if getattr(config, name) != type(config).__dataclass_fields__[name].default]
    if config.memory_budget is not None and given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"--memory-budget chooses {options}, which was given as well; leave out one or the other")
    meter = BitsLost() if where == "reversible" and not config.carry else None
    memory = MemoryPolicy(config.checkpoint_every, where, config.carry, loss_alone=config.loss_alone, meter=meter)
    micro_batch = None if config.micro_batch == "auto" else config.micro_batch
    if config.memory_budget is not None and (config.compile or config.cuda_graphs):
        raise InputError(
            "--memory-budget counts the bytes of the network as it is, not of what --compile or --cuda-graphs makes of "
            "it; leave out one or the other"
        )
    return Execution(
        memory, micro_batch, config.lean, config.checkpoint_blocks, config.weights,
        config.precision, config.channels_last, config.compile, config.cuda_graphs,
    )  # fmt: skip


def plans(
    config: Config, model: Denoiser, placed: Denoiser, recipe: Recipe, solver: LearnedTimes, device: torch.device
) -> Plans | None:
    """Ways to run an update within the budget, the choice said in a line; None without a budget.

    One evaluation of the placed model is timed for predictions in seconds; the choice does not hang on it, so that a
    resumed run makes the same.
    """
    if config.memory_budget is None:
        return None
    parse_bytes(config.memory_budget)
    seconds = evaluation_seconds(placed, recipe.batch, device)
    with progress() as bar:
        task = bar.add_task("plan", total=2 + len(BLOCKS), note="")
        found = plan(
            model, config.steps, recipe.batch, config.memory_budget, loss=config.loss, weights=(config.weights,),
            like=execution(config), tableau=solver.tableau(model.prediction), evaluation_seconds=seconds,
            on_probe=lambda what: bar.update(task, advance=1, note=what),
        )  # fmt: skip
        bar.update(task, completed=2 + len(BLOCKS), note="")
    chosen = found.choice
    console.print(
        f"plan      {chosen.execution}: {show_bytes(chosen.bytes)} of {show_bytes(found.budget)}, "
        f"{chosen.calls} network calls and about {chosen.seconds:.2g} s an update",
        soft_wrap=True,
    )
    return found


def evaluation_seconds(denoiser: Denoiser, batch: int, device: torch.device) -> float:
    """Seconds of an evaluation of the batch without gradients, from one of a few samples; the first does not count."""
    few = min(batch, 4)
    noise, cond = seeded(denoiser, range(few))
    noise, cond = noise.to(device), None if cond is None else cond.to(device)
    t = torch.full((), 0.5, dtype=torch.float64, device=device)
    with torch.no_grad():
        for _ in range(2):
            begun = time.perf_counter()
            denoiser(noise, t, cond)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - begun
    return seconds * batch / few


def teacher_set(config: Config, denoiser: Denoiser, device: torch.device) -> tuple[list[int], Tensor]:
    """Training seeds and the teacher's samples for them, made where they are missing."""
    seeds = parse_seeds(config.train_seeds)
    if {*SELECTION_SEEDS, *HELD_OUT_SEEDS} & {*seeds}:
        raise InputError(
            f"training seeds must leave 40000-40063 and 50000-50511 for evaluation, got {config.train_seeds}"
        )
    teacher = config.teacher
    name = f"teacher-{Path(config.model).stem.replace(':', '-')}-{teacher.solver}-{teacher.steps}-{teacher.grid}"
    name += "-int8" if config.weights == "int8" else ""
    name += f"-{config.precision}" if config.precision != "fp32" else ""
    out = config.teacher_set or Path("runs") / name
    make_teacher_set(denoiser, seeds, teacher, out, batch=config.sample_batch, device=device)
    found, samples = load_teacher_set(out)
    row = {seed: i for i, seed in enumerate(found)}
    return seeds, samples[[row[seed] for seed in seeds]]


def samples(denoiser: Denoiser, seeds: range, config: Config, device: torch.device) -> comparison.Samples:
    """Seeds with the teacher's samples, to measure against."""
    teacher = teacher_samples(denoiser, seeds, config.teacher, config.sample_batch, device)
    return comparison.Samples.of(denoiser, seeds, teacher, device)
