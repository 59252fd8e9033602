"""Where a run begins: its directory, and the options that count, which a resumed run has on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .._cli import InputError, console
from ..teacher import TeacherSolver
from . import loggers
from .directory import RunDirectory
from .options import Config, plain
from .setup import CHOSEN, execution, recipe

# What a resumed run may be given anew.
RESUMABLE = ("config", "out", "resume", "device", "evaluation", "sample_batch", "compare")
# What a resumed run goes on with unless it is given anew: the result is the same to rounding.
MEMORY = (
    "memory_budget", "checkpoint_every", "trajectory", "offload", "carry", "micro_batch", "lean", "checkpoint_blocks",
    "loss_alone", "split_guidance", "loss_chunk", "loss_cache", "discriminator_micro_batch", "weights", "shard",
    # Speed of the frozen network; its precision and its compiler stay what they were.
    "channels_last", "cuda_graphs",
)  # fmt: skip
# The same, and the result is the same to the bit.
OUTPUT = ("keep", "logger")
# What says something only with --adversarial.
ADVERSARIAL = (
    "adversarial_weight", "adversarial_loss", "discriminator", "discriminator_rate", "discriminator_precision",
    "discriminator_micro_batch", "gamma", "penalty", "fakes", "warm_up",
)  # fmt: skip
LEAST = {
    "save_every": 1, "sample_every": 1, "log_every": 1, "sample_batch": 1, "evaluate_every": 0, "patience": 0,
    "keep": 2, "max_skipped": 1, "max_rollbacks": 0, "selection": 1, "held_out": 1,
}  # fmt: skip


def opened(config: Config, options: Collection[str]) -> tuple[RunDirectory, Config]:
    """The run directory and the configuration that counts: the stored one if resuming."""
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}")
    if config.patience and not config.evaluate_every:
        raise InputError(f"--patience {config.patience} counts measurements, and --evaluate-every 0 makes none")
    execution(config)
    loggers.check(config.logger)
    if config.out is None:
        model = Path(config.model).stem.replace(":", "-")
        named = "-".join(filter(None, (model, config.student, config.form, config.base)))
        stem = f"runs/{named}-k{config.steps}"
        taken = [Path(stem), *(Path(f"{stem}-{n}") for n in range(2, 10_000))]
        free = next(i for i, path in enumerate(taken) if not RunDirectory(path).exists())
        config = dataclasses.replace(config, out=taken[max(0, free - 1) if config.resume else free])
    assert config.out is not None
    directory = RunDirectory(config.out)
    directory.check_writable()
    if config.resume == "auto" and not directory.exists():
        config = dataclasses.replace(config, resume=False)
    given, default = plain(config), _dotted(plain(Config()))
    said = {name: value for name, value in _dotted(given).items() if name in options or value != default[name]}
    if not config.resume:
        if directory.exists():
            directory.create({})  # refuses, before any work is done
        _check(config, said)
        return directory, config
    stored = directory.config()
    before, anew = _dotted(stored), said.keys() & {*MEMORY, *OUTPUT}
    if anew & {*CHOSEN, "checkpoint_every"} and "memory_budget" not in anew:
        stored["memory_budget"] = None  # what it chose is chosen by hand now
    for name, value in said.items():
        another = {"int8", "nf4"} & {str(value), str(before.get(name))}  # network, and not the same one elsewhere
        free = name in (*RESUMABLE, *OUTPUT) or (name in MEMORY and not another)
        if not free and value != before.get(name):
            raise InputError(
                f"--resume continues with {name}={before.get(name)!r} from {directory.path}/config.json, but "
                f"{name}={value!r} was given; leave it out, or start a new run"
            )
    kept = {name: getattr(config, name) for name in RESUMABLE}
    kept |= {name: given[name] for name in anew}
    try:
        stored["teacher"] = TeacherSolver(**stored["teacher"])
        for name in ("config", "teacher_set", "discriminator", "start_from"):
            stored[name] = stored[name] and Path(stored[name])
        config = Config(**{**stored, **kept})
    except (KeyError, TypeError) as error:
        raise InputError(f"{directory.path}/config.json is not one of this version ({error})") from None
    _check(config, said)
    return directory, config


def _dotted(options: dict[str, Any]) -> dict[str, Any]:
    """Options by the names that the command line has for them: those of the teacher after a dot."""
    nested = {name: value for name, value in options.items() if isinstance(value, dict)}
    inner = {f"{name}.{key}": v for name, value in nested.items() for key, v in value.items()}
    return {name: value for name, value in options.items() if name not in nested} | inner


def _check(config: Config, said: Collection[str]) -> None:
    """Refuses, of what was given, what would have no effect on this run; a patience without one is told."""
    useless = next((name for name in ADVERSARIAL if name in said), None)
    if useless is not None and not config.adversarial:
        raise InputError(
            f"--{useless.replace('_', '-')} {getattr(config, useless)} is of a discriminator, and there is none; give "
            "--adversarial as well, or leave it out"
        )
    iterations = recipe(config).iterations
    if "warm_up" in said and config.warm_up >= iterations:
        raise InputError(
            f"--warm-up must leave some of the {iterations} updates for the discriminator, got {config.warm_up}"
        )
    # The first measurement is the nearest so far.
    if config.patience and (config.patience + 1) * config.evaluate_every >= iterations:
        console.print(
            f"patience  of {config.patience} measurements, one in {config.evaluate_every} updates, cannot end a run of "
            f"{iterations} early; lower --patience or --evaluate-every",
            soft_wrap=True,
        )
