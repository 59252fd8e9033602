"""What ``train`` builds from its options."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import comparison
from .._cli import InputError, console, progress
from ..adapters.digits import DIGITS
from ..adapters.r3gan import load_r3gan
from ..conditioning import SCALES, moved
from ..denoiser import Denoiser, seeded
from ..distributed import ALONE, Group
from ..execution import BLOCKS, Execution
from ..iteration import Beside
from ..losses import DistillationLoss, decoded, distillation_loss
from ..memory import BitsLost, MemoryPolicy, shard_weights
from ..networks import discriminator_for
from ..planner import LIBRARIES, Plans, plan
from ..solvers import LearnedTimes, load_solver
from ..teacher import teacher_samples
from ..units import parse_bytes, show_bytes
from .adversary import Adversary
from .recipe import RECIPES, Recipe
from .students import guidance_range, steps_range

if TYPE_CHECKING:
    from .options import Config

SELECTION_SEEDS = range(40_000, 40_064)
HELD_OUT_SEEDS = range(50_000, 50_512)
# What a memory budget chooses.
CHOSEN = (
    "trajectory", "offload", "carry", "micro_batch", "lean", "checkpoint_blocks", "loss_alone", "split_guidance",
)  # fmt: skip
CIFAR10_WEIGHT = 0.1  # of the adversarial loss, by arXiv 2510.17699


def recipe_name(config: Config) -> str:
    """What --recipe says, or what auto is."""
    return config.recipe if config.recipe != "auto" else ("quick" if config.model in DIGITS else "paper")


def recipe(config: Config) -> Recipe:
    """The recipe by its name, for every K of several and a range of guidance, and what was given instead."""
    scales = 1 if guidance_range(config) is None else SCALES
    named = RECIPES[recipe_name(config)].over(len(steps_range(config)) * scales)
    given = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(Recipe)}
    found = dataclasses.replace(named, **{k: v for k, v in given.items() if v is not None})
    if found.iterations < 1 or found.batch < 1 or not 0 < found.rate < math.inf or not 0 <= found.ema < 1:
        raise InputError(f"iterations and batch must be at least 1, rate above 0 and ema in [0, 1), got {found}")
    if not 0 <= found.rate_warm_up < found.iterations or not found.clip > 0:
        raise InputError(
            f"--rate-warm-up must be shorter than the {found.iterations} updates and --clip above 0, "
            f"got {found.rate_warm_up} and {found.clip:g}"
        )
    return found


def compared(config: Config, denoiser: Denoiser) -> list[tuple[str, LearnedTimes]]:
    """The solvers to measure beside the result, of any K, named by where they lie."""
    found = []
    for path in config.compare:
        solver = load_solver(path, denoiser.schedule, model=denoiser.name)
        told = denoiser.told_guidance
        ends = told if isinstance(told, tuple) else (told,)
        try:
            for scale in ends:
                solver.check_guidance(scale)
        except ValueError as error:
            raise InputError(f"{path} is {error}") from None
        found.append((path.parent.name or path.stem, solver))
    return found


def adversary(config: Config, denoiser: Denoiser, recipe: Recipe, device: torch.device) -> Adversary | None:
    """The discriminator beside the solver, or None without --adversarial; its random weights follow from --seed."""
    if not config.adversarial:
        return None
    asked: dict[str, Any] = {
        "weight": config.adversarial_weight, "rate": config.discriminator_rate, "gamma": config.gamma,
        "kind": config.adversarial_loss, "method": config.penalty, "fakes": config.fakes, "warm_up": config.warm_up,
        "micro_batch": config.discriminator_micro_batch,
        "precision": torch.bfloat16 if config.discriminator_precision == "bf16" else None,
    }  # fmt: skip
    if recipe_name(config) == "paper" and denoiser.shape == (3, 32, 32) and asked["weight"] is None:
        asked["weight"] = CIFAR10_WEIGHT
    settings = dataclasses.replace(recipe.adversary, **{k: v for k, v in asked.items() if v is not None})
    shape = denoiser.shape or ()
    if config.discriminator is not None:
        network = load_r3gan(config.discriminator)
        network.check(torch.empty(1, *shape))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = discriminator_for(shape)
    if settings.fakes == "reuse":
        console.print(
            "fakes     reused: the discriminator sees the samples of the update before, beside the teacher's of the "
            "same noise, and each update saves K evaluations",
            soft_wrap=True,
        )
    return Adversary(network, settings, device)


def loss(config: Config, denoiser: Denoiser, device: torch.device) -> DistillationLoss:
    """The distance to the teacher's samples: of states, or of what a latent model's decoder makes of them."""
    cache = 0 if config.loss_cache is None else parse_bytes(config.loss_cache)
    found = distillation_loss(config.loss, device, chunk=config.loss_chunk, cache=cache)
    decoder, where = denoiser.decoder, config.loss_in
    if where == "pixels" and decoder is None:
        raise InputError(f"--loss-in pixels needs a decoder, and {denoiser.name} has none; leave it out")
    if decoder is None or where == "states" or (where == "auto" and "lpips" not in config.loss):
        if config.loss_tile is not None:
            raise InputError(f"--loss-tile {config.loss_tile} is of decoded samples; give --loss-in pixels as well")
        return found
    if isinstance(decoder, nn.Module):
        decoder = decoder.to(device).requires_grad_(False)
    return decoded(found, decoder, chunk=config.loss_chunk or 1, tile=config.loss_tile)


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
    memory = MemoryPolicy(
        config.checkpoint_every, where, config.carry, config.split_guidance, config.loss_alone, meter
    )  # fmt: skip
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


def sharded(denoiser: Denoiser, execution: Execution, device: torch.device) -> tuple[Denoiser, Execution]:
    """A denoiser on the host, seen as updates see it and then spread over the processes; nothing is left to view."""
    fingerprint = denoiser.fingerprint()
    shared = shard_weights(execution.view(denoiser), device)
    assert isinstance(shared, Denoiser)
    shared.fingerprint = lambda: fingerprint  # type: ignore[method-assign]  # its weights were whole then
    return shared, dataclasses.replace(execution, lean=False, blocks="none")


def check_shard(config: Config, group: Group) -> None:
    """Raises InputError for what --shard does not go with."""
    if config.shard and group.size == 1:
        raise InputError("--shard spreads the weights over processes, and there is one; torchrun --nproc-per-node N")
    if config.shard and config.weights != "resident":
        raise InputError(f"--shard and --weights {config.weights} are two places for the weights; leave one out")
    if config.shard and (config.compile or config.cuda_graphs):
        raise InputError(
            "--shard fetches weights between the pieces of a call, and --compile and --cuda-graphs make it one piece; "
            "leave out one or the other"
        )
    if config.shard and config.memory_budget is not None:
        raise InputError(
            "--memory-budget cannot plan for --shard; choose --micro-batch, --lean and --checkpoint-blocks by hand"
        )
    if config.shard:
        dataclasses.replace(group, lockstep=True).part(recipe(config).batch)


def plans(
    config: Config, model: Denoiser, placed: Denoiser, recipe: Recipe, solver: LearnedTimes, device: torch.device,
    group: Group = ALONE, adversary: Adversary | None = None, loss: DistillationLoss | None = None,
) -> Plans | None:  # fmt: skip
    """Ways to run an update within the budget, the choice said in a line; None without a budget.

    One evaluation of the placed model is timed for predictions in seconds; the choice does not hang on it, so that a
    resumed run makes the same.
    """
    if config.memory_budget is None:
        return None
    batch = group.most(recipe.batch)
    seconds, shape = evaluation_seconds(placed, batch, device), model.shape or ()
    beside: Beside | Callable[[int], Beside] | None = None
    if adversary is not None and config.discriminator_micro_batch is not None:
        beside = adversary.beside(shape, batch, solver.steps)
    elif adversary is not None:
        beside = functools.partial(adversary.fitted, shape, batch, solver.steps)
    with progress() as bar:
        task = bar.add_task("plan", total=2 + len(BLOCKS), note="")
        found = plan(
            model, solver.steps, batch, config.memory_budget, cond=seeded(model, [0])[1],
            libraries=LIBRARIES if device.type == "cuda" else 0, loss=loss or config.loss,
            loss_chunk=config.loss_chunk, weights=(config.weights,), like=execution(config),
            tableau=solver.tableau(model.prediction), evaluation_seconds=seconds, beside=beside,
            on_probe=lambda what: bar.update(task, advance=1, note=what),
        )  # fmt: skip
        bar.update(task, completed=2 + len(BLOCKS), note="")
    chosen, pairs = found.choice, adversary and adversary.settings.micro_batch
    said = f", {pairs} pair(s) at a time in the discriminator" if pairs else ""
    console.print(
        f"plan      {chosen.execution}{said}: {show_bytes(chosen.bytes)} of {show_bytes(found.budget)}, "
        f"{chosen.calls} network calls and about {chosen.seconds:.2g} s an update",
        soft_wrap=True,
    )
    return found


def sample_batch(plans: Plans, model: Denoiser) -> int:
    """Samples at a time whose evaluation without gradients fits the budget, beside the weights."""
    iteration, (one, two) = plans.iteration, (plans.iteration.probe.cost(False, "none", n).plain_peak for n in (1, 2))
    room = 0.9 * (plans.budget - iteration.weight_bytes(plans.choice.weights)) - one
    return max(1, (1 + int(room / max(two - one, 1))) // model.calls)


def evaluation_seconds(denoiser: Denoiser, batch: int, device: torch.device) -> float:
    """Seconds of an evaluation of the batch without gradients, from one of a few samples; the first does not count."""
    few = min(batch, 4)
    noise, cond = seeded(denoiser, range(few))
    noise, cond = moved((noise, cond), device)
    t = torch.full((), 0.5, dtype=torch.float64, device=device)
    with torch.no_grad():
        for _ in range(2):
            begun = time.perf_counter()
            denoiser(noise, t, cond)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - begun
    return seconds * batch / few


def samples(
    denoiser: Denoiser, seeds: range, config: Config, device: torch.device, group: Group = ALONE
) -> comparison.Samples:
    """Seeds with the teacher's samples, to measure against."""
    teacher = teacher_samples(denoiser, seeds, config.teacher, config.sample_batch, device, group=group)
    return comparison.Samples.of(denoiser, seeds, teacher, device)
