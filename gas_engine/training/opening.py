"""Where a run begins: its directory, and the options that count, which a resumed run has on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from .._cli import InputError
from ..teacher import TeacherSolver
from . import loggers
from .directory import RunDirectory
from .options import Config, plain
from .setup import CHOSEN, execution

# What a resumed run may be given anew.
RESUMABLE = ("out", "resume", "device", "evaluation", "sample_batch", "compare")
# What a resumed run goes on with unless it is given anew: the result is the same to rounding.
MEMORY = (
    "memory_budget", "checkpoint_every", "trajectory", "offload", "carry", "micro_batch", "lean", "checkpoint_blocks",
    "loss_alone", "weights", "shard",
    # Speed of the frozen network; its precision and its compiler stay what they were.
    "channels_last", "cuda_graphs",
)  # fmt: skip
# The same, and the result is the same to the bit.
OUTPUT = ("keep", "logger")
LEAST = {
    "save_every": 1, "sample_every": 1, "log_every": 1, "sample_batch": 1, "evaluate_every": 0, "patience": 0,
    "keep": 2, "max_skipped": 1, "max_rollbacks": 0,
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
        stem = f"runs/{Path(config.model).stem.replace(':', '-')}-{config.student}-k{config.steps}"
        taken = [Path(stem), *(Path(f"{stem}-{n}") for n in range(2, 10_000))]
        free = next(i for i, path in enumerate(taken) if not RunDirectory(path).exists())
        config = dataclasses.replace(config, out=taken[max(0, free - 1) if config.resume else free])
    assert config.out is not None
    directory = RunDirectory(config.out)
    directory.check_writable()
    if config.resume == "auto" and not directory.exists():
        config = dataclasses.replace(config, resume=False)
    if not config.resume:
        if directory.exists():
            directory.create({})  # refuses, before any work is done
        return directory, config
    stored, given, default = directory.config(), plain(config), plain(Config())
    anew = {name for name in (*MEMORY, *OUTPUT) if name in options or given[name] != default[name]}
    if anew & {*CHOSEN, "checkpoint_every"} and "memory_budget" not in anew:
        stored["memory_budget"] = None  # what it chose is chosen by hand now
    for name, value in given.items():
        free = name in (*RESUMABLE, *OUTPUT) or (name in MEMORY and "int8" not in (value, stored.get(name)))
        if not free and value != default[name] and value != stored.get(name):
            raise InputError(
                f"--resume continues with {name}={stored.get(name)!r} from {directory.path}/config.json, but "
                f"{name}={value!r} was given; leave it out, or start a new run"
            )
    kept = {name: getattr(config, name) for name in RESUMABLE}
    kept |= {name: given[name] for name in anew}
    try:
        stored["teacher"] = TeacherSolver(**stored["teacher"])
        for name in ("teacher_set", "discriminator", "start_from"):
            stored[name] = stored[name] and Path(stored[name])
        return directory, Config(**{**stored, **kept})
    except (KeyError, TypeError) as error:
        raise InputError(f"{directory.path}/config.json is not one of this version ({error})") from None
