"""A training run on disk: configuration, metrics, checkpoints that survive a crash, and the solver."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._cli import InputError, console, writable
from ..files import sha256, sync, write_json, write_text

Checkpoint = tuple[int, dict[str, Tensor], dict[str, Any]]


class RunDirectory:
    """``config.json``, ``metrics.jsonl``, ``events.*``, ``samples/``, ``checkpoints/step-000500/`` and the solver.

    A checkpoint is ``state.safetensors`` (tensors, numbers as JSON metadata) and ``manifest.json`` (step, checksum,
    distance to the teacher if it was measured). It is written beside its place, synced and renamed, so that a directory
    ``step-*`` is always complete. Raises OSError where something cannot be written, and leaves no half of it.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes  # of several processes one writes
        self._failing: set[str] = set()

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def history(self) -> Path:
        """Times and tableau of the averaged solver in every row."""
        return self.path / "history.jsonl"

    @property
    def solver(self) -> Path:
        return self.path / "solver.safetensors"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    def exists(self) -> bool:
        return (self.path / "config.json").exists()

    def check_writable(self) -> None:
        """Raises InputError if files cannot be made there; leaves nothing behind."""
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}; give another --out") from None

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the directory. Raises InputError if it already holds a run, or is not writable."""
        if not self.writes:
            return
        if self.exists():
            raise InputError(f"{self.path} already holds a run; continue it with --resume, or give another --out")
        writable(self.path)
        write_json(self.path / "config.json", dict(config))

    def config(self) -> dict[str, Any]:
        """The configuration that the run was started with."""
        try:
            return dict(json.loads((self.path / "config.json").read_text()))
        except FileNotFoundError:
            raise InputError(f"there is no run to resume in {self.path}") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.path / 'config.json'} is damaged ({error})") from None

    def attempt(self, what: str, write: Callable[[], Any]) -> bool:
        """Write what the run can do without for now; where that begins to fail, say so in a line and go on."""
        if not self.writes:
            return True
        try:
            write()
        except OSError as error:
            if what not in self._failing:
                said = f"{what} could not be written ({error.strerror or error}); the run goes on, and tries again"
                console.print(said, soft_wrap=True)
            self._failing.add(what)
            return False
        self._failing.discard(what)
        return True

    def log(self, row: Mapping[str, Any], path: Path | None = None) -> None:
        """Append one row to the metrics, or to another such file, whole or not at all."""
        line = (json.dumps(row) + "\n").encode()
        with open(path or self.metrics, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) != len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def forget_after(self, step: int) -> None:
        """Drop metrics and checkpoints of later steps, which the run will write again."""
        if not self.writes:
            return
        for path in (self.metrics, self.history):
            if path.exists():
                rows = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
                write_text(path, "".join(f"{line}\n" for line in rows))
        for checkpoint in self.checkpoints():
            if _number(checkpoint) > step:
                _remove(checkpoint)
        for left in (self.path / "checkpoints").glob(".*"):  # by a process that was killed, like what follows
            shutil.rmtree(left, ignore_errors=True)
        for left in self.path.rglob(".*.tmp*"):
            left.unlink(missing_ok=True)

    def save(
        self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], keep: int = 3, every: int = 1,
        distance: float | None = None,
    ) -> None:  # fmt: skip
        """Write a checkpoint, then drop all but the newest ``keep`` at multiples of ``every``, and the nearest."""
        if not self.writes:
            return
        final = self.path / "checkpoints" / f"step-{step:06d}"
        temporary = final.with_name(f".{final.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        state = temporary / "state.safetensors"
        try:
            plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(plain, state, {"numbers": json.dumps(numbers)})
            sync(state)
            write_json(temporary / "manifest.json", {"step": step, "sha256": sha256(state), "distance": distance})
            _remove(final)
            temporary.rename(final)
            sync(final.parent)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        older = self.checkpoints()
        measured = [path for path in older if _distance(path) < math.inf]
        nearest = sorted(measured, key=_distance)[:1]
        kept = {final, *nearest, *[path for path in older if _number(path) % every == 0][-keep:]}
        for path in older:
            if path not in kept:
                _remove(path)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"), key=_number)

    def restore(self, before: float = math.inf, every: int = 1, strict: bool = True) -> Checkpoint | None:
        """(step, tensors, numbers) of the newest checkpoint whose checksum holds.

        Of fewer than ``before`` updates, a multiple of ``every``: not one that a signal asked for, at another time in
        each run. Says in a line which are damaged. None if there is none; ``strict``: InputError if all are damaged.
        """
        damaged = []
        for checkpoint in reversed(self.checkpoints()):
            if _number(checkpoint) >= before or _number(checkpoint) % every:
                continue
            try:
                manifest = json.loads((checkpoint / "manifest.json").read_text())
                state = checkpoint / "state.safetensors"
                if sha256(state) != manifest["sha256"]:
                    raise ValueError("its checksum does not hold")
                with safe_open(state, framework="pt") as file:
                    # Copies, because a slice of the file is aligned as it happens, and some BLAS sum by alignment.
                    tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (no mapping)
                    numbers = json.loads(file.metadata()["numbers"])
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                damaged.append(f"{checkpoint.name} ({error})")
                continue
            if damaged:
                console.print(f"damaged: {', '.join(damaged)}; going on from {checkpoint.name}", soft_wrap=True)
            return int(manifest["step"]), tensors, numbers
        if damaged:
            problem = f"no checkpoint of {self.path} can be read: {', '.join(damaged)}"
            if strict:
                raise InputError(f"{problem}; begin again with --resume auto, or with another --out")
            console.print(problem, soft_wrap=True)
        return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser as named tensors, ``optimizer.<parameter index>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{k}": torch.as_tensor(v) for i, row in state.items() for k, v in row.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in under("optimizer", tensors).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint, by their names within it."""
    return {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}


def _remove(directory: Path) -> None:
    """Remove a directory so that it is never seen half removed."""
    if directory.exists():
        hidden = directory.with_name(f".gone-{directory.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        directory.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _distance(checkpoint: Path) -> float:
    try:
        found = json.loads((checkpoint / "manifest.json").read_text())["distance"]
        return math.inf if found is None else float(found)
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, ValueError):  # a line cut off by a crash
        return 2**62
