"""Where rows of metrics go besides ``metrics.jsonl``: TensorBoard, W&B or trackio, imported when asked for."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._cli import InputError, console

Row = Mapping[str, Any]
Write = Callable[[int, Row], Any]
# What is not a dependency of this package.
OPTIONAL = ("wandb", "trackio")


def check(name: str) -> None:
    """Raises InputError if the package of a logger is missing."""
    if name in OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError:
            raise InputError(
                f"--logger {name} needs the {name} package: `pip install {name}`, or use --logger tensorboard"
            ) from None


@contextlib.contextmanager
def logger(name: str, path: Path, config: Mapping[str, Any], first: int) -> Iterator[Write]:
    """Yield ``write(step, row)`` of a run in ``path`` that goes on after update ``first``.

    A row is any columns: numbers, None for one that is not finite. A service that fails later (a full disk, no network)
    is left out, with a line, and the run goes on. Raises InputError where it cannot be opened.
    """
    if name == "none":
        yield lambda step, row: None
        return
    try:
        send, close = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}[name](path, config, first)
    except Exception as error:  # whatever a service raises
        raise InputError(f"--logger {name} cannot be opened ({_said(error)}); try another, or none") from None
    failed = False

    def guarded(act: Callable[[], Any]) -> None:
        nonlocal failed
        try:
            if not failed:
                act()
        except Exception as error:  # whatever a service raises
            failed = True
            console.print(f"{name} failed ({_said(error)}) and is left out; metrics.jsonl goes on", soft_wrap=True)

    try:
        yield lambda step, row: guarded(lambda: send(step, row))
    finally:
        guarded(close)


def _tensorboard(path: Path, config: Mapping[str, Any], first: int) -> tuple[Write, Callable[[], Any]]:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

    events = SummaryWriter(str(path), purge_step=first or None)

    def send(step: int, row: Row) -> None:
        for name, value in row.items():
            if value is None or isinstance(value, int | float):
                tag = name if "/" in name else f"train/{name}"
                events.add_scalar(tag, math.nan if value is None else value, step)

    return send, events.close


def _wandb(path: Path, config: Mapping[str, Any], first: int) -> tuple[Write, Callable[[], Any]]:
    import wandb

    # A name that a resumed run finds again; its own axis, because W&B's own cannot go back to a checkpoint.
    identity = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()[:16]
    run = wandb.init(
        project="gas_engine", name=path.name, id=identity, resume="allow", dir=str(path), config=dict(config)
    )  # fmt: skip
    run.define_metric("*", step_metric="step")
    return lambda step, row: run.log({"step": step, **row}), run.finish


def _trackio(path: Path, config: Mapping[str, Any], first: int) -> tuple[Write, Callable[[], Any]]:
    import trackio

    trackio.init(project="gas_engine", name=path.name, resume="allow", config=dict(config))
    return lambda step, row: trackio.log(dict(row), step=step), trackio.finish


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
