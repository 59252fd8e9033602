"""What every verb shares: options by tyro, one clear sentence and exit code 2 for bad input, seeds, tables."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Config = TypeVar("Config")
console = Console()


class InputError(ValueError):
    """Bad input; its message is one sentence with the value seen and the way out."""


def command(verb: str, config: type[Config], run: Callable[[Config], Any], argv: Sequence[str] | None) -> None:
    """Parse options into ``config`` and run; ValueError and OSError become one sentence on stderr, exit code 2."""
    warnings.showwarning = lambda message, *_, **__: print(f"gas-engine {verb}: warning: {message}", file=sys.stderr)
    options = tyro.cli(config, args=argv, prog=f"gas-engine {verb}")
    try:
        run(options)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("GAS_ENGINE_TRACEBACK"):
            raise
        more = "; a smaller --sample-batch or --batch takes less" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"gas-engine {verb}: {error}{more}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"gas-engine {verb}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def parse_seeds(text: str) -> list[int]:
    """``"0-63,100"`` -> the listed seeds, in order. Raises InputError for anything else, or for repeated seeds."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            named = range(int(first), int(last or first) + 1)
            if not named or named[-1] >= 2**63 or len(named) > 10**7:
                raise ValueError
            seeds += named
    except ValueError:
        raise InputError(f"seeds must look like 0-63 or 0-9,42, got {text!r}") from None
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds must be at least one and different from each other, got {text!r}")
    return seeds


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); try --device auto or cpu") from None


def writable(path: Path) -> Path:
    """The directory, made if missing; InputError if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None
    return path


def progress() -> Progress:
    """A progress bar with time left; silent where the output is no terminal."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=console, refresh_per_second=4,
    )  # fmt: skip
