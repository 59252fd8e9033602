"""A training run on disk: configuration, metrics, checkpoints that survive a crash, and the solver."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._cli import InputError, writable
from ..files import atomic, sha256, write_json


class RunDirectory:
    """``config.json``, ``metrics.jsonl``, ``events.*``, ``samples/``, ``checkpoints/step-000500/`` and the solver.

    A checkpoint is ``state.safetensors`` (tensors, numbers as JSON metadata) and ``manifest.json`` (step, checksum).
    It is written beside its place and renamed, so that a directory ``step-*`` is always complete.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes  # of several processes one writes

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def solver(self) -> Path:
        return self.path / "solver.safetensors"

    def exists(self) -> bool:
        return (self.path / "config.json").exists()

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

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row of metrics."""
        if not self.writes:
            return
        with open(self.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop metrics of later steps, which a resumed run will write again."""
        if self.writes and self.metrics.exists():
            rows = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= step]
            with atomic(self.metrics) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in rows))

    def save(self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], keep: int = 3) -> None:
        """Write a checkpoint, then drop all but the newest ``keep``."""
        if not self.writes:
            return
        root = self.path / "checkpoints"
        temporary, final = root / f".step-{step:06d}", root / f"step-{step:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        state = temporary / "state.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, state, {"numbers": json.dumps(numbers)})
        write_json(temporary / "manifest.json", {"step": step, "sha256": sha256(state)})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def restore(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """(step, tensors, numbers) of the newest checkpoint whose checksum holds; None if there is none yet."""
        damaged = []
        for checkpoint in reversed(self.checkpoints()):
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
            return int(manifest["step"]), tensors, numbers
        if damaged:
            raise InputError(f"no checkpoint of {self.path} can be read: {', '.join(damaged)}")
        return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser as named tensors, ``optimizer.<parameter index>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{k}": torch.as_tensor(v) for i, row in state.items() for k, v in row.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, ValueError):  # a line cut off by a crash
        return 2**62
