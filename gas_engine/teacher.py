"""Write a set of teacher samples: ``gas-engine teacher --model digits --seeds 0-1399 --out DIR``.

A set is a directory: ``index.json`` (what made it, which shards are done, their checksums) and safetensors shards of
``seeds`` [n] and ``samples`` [n, C, H, W]. Noise and classes are not stored: they follow from the seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ._cli import InputError, command, console, parse_seeds, progress, writable
from .conditioning import moved
from .denoiser import Denoiser, seeded
from .distributed import ALONE, Group
from .files import atomic, sha256, write_json
from .models import PlacedModelOptions, open_model, place
from .rollout import rollout
from .schedule import Schedule
from .solvers.named import named_solver
from .tableau import Tableau

FORMAT = "gas_engine.teacher/1"


@dataclass
class TeacherSolver:
    """The many-step solver that a student learns to match."""

    solver: str = "unipc3-bh1"
    """Name of a classical solver."""
    steps: int = 20
    """Network evaluations."""
    grid: str = "logSNR"
    """Grid of times."""
    t_eps: float | None = None
    """Time at which the teacher stops; 1e-4 unless given, or 1e-3 where the schedule does not reach as far."""

    def on(self, schedule: Schedule) -> TeacherSolver:
        """With a t_eps for this schedule."""
        t_eps = self.t_eps
        if t_eps is None:
            t_eps = 1e-4 if schedule.domain[0] < 1e-4 else 1e-3
        return TeacherSolver(self.solver, self.steps, self.grid, t_eps)

    def tableau(self, schedule: Schedule) -> Tableau:
        """Raises ValueError for an unknown solver or grid, and for a t_eps outside the schedule."""
        solver = self.on(schedule)
        assert solver.t_eps is not None
        return named_solver(solver.solver, schedule, solver.steps, solver.grid, solver.t_eps)


@dataclass
class Config(TeacherSolver, PlacedModelOptions):
    """Write a set of teacher samples, resuming where an earlier call was stopped."""

    seeds: str = "0-1399"
    """Seeds to sample, such as 0-1399 or 0-9,42."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = field(default=Path("runs/teacher"))
    """Directory of the set."""
    batch: int = 128
    """Samples at a time."""
    shard: int = 1024
    """Samples per file."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, ..."""


@torch.no_grad()
def teacher_samples(
    denoiser: Denoiser, seeds: Sequence[int], solver: TeacherSolver, batch: int = 128,
    device: torch.device | None = None, advance: Any = None, group: Group = ALONE,
) -> Tensor:  # fmt: skip
    """Samples of the given seeds, float32 on the CPU, [N, *shape]; ``advance(n)`` is told of every n finished.

    The processes of ``group`` take a batch each and tell each other: same bits for any number of them.
    """
    device = device or torch.device("cpu")
    tableau = solver.tableau(denoiser.schedule)

    def samples(start: int) -> Tensor:
        noise, cond = seeded(denoiser, seeds[start : start + batch])
        done = rollout(denoiser, noise.to(device), tableau, moved(cond, device)).cpu()
        if advance is not None:
            advance(len(noise))
        return done

    return torch.cat(group.map(samples, range(0, len(seeds), batch)))


def make_teacher_set(
    denoiser: Denoiser, seeds: Sequence[int], solver: TeacherSolver, out: Path, *, batch: int = 128, shard: int = 1024,
    device: torch.device | None = None, group: Group = ALONE,
) -> Path:  # fmt: skip
    """Write what a set lacks of the given seeds, or what is damaged of it; return its directory.

    Seeds that the set holds already stay, also those that this call does not name.
    Every shard is written atomically and entered into the index with its SHA-256 afterwards, so a killed run loses at
    most one shard. The processes of ``group`` sample together and share ``out``, where rank 0 writes.
    Raises InputError if ``out`` holds a set that was made otherwise.
    """
    if batch < 1 or shard < 1:
        raise InputError(f"batch and shard must be at least 1, got {batch} and {shard}")
    solver = solver.on(denoiser.schedule)
    solver.tableau(denoiser.schedule)  # refuse before writing
    writable(out)
    made_by = {
        "model": denoiser.name, "fingerprint": denoiser.fingerprint(), **json.loads(json.dumps(denoiser.facts())),
        **{name: getattr(solver, name) for name in TeacherSolver.__dataclass_fields__},
    }  # fmt: skip
    index = group.first(lambda: _read_index(out)) or {"made_by": made_by, "shards": []}
    changed = [key for key in {**made_by, **index["made_by"]} if index["made_by"].get(key) != made_by.get(key)]
    if changed:
        before, now = index["made_by"].get(changed[0]), made_by.get(changed[0])
        raise InputError(
            f"{out} holds a teacher set made with another {changed[0]} ({before!r}, now {now!r}); "
            "delete it, or give another directory"
        )
    kept = group.first(lambda: [entry for entry in index["shards"] if _intact(out, entry)])
    held = {seed for entry in kept for seed in entry["seeds"]}
    lacking = [seed for seed in seeds if seed not in held]
    missing = [lacking[i : i + shard] for i in range(0, len(lacking), shard)]
    with progress() as bar:
        done = len(seeds) - len(lacking)
        task = bar.add_task("teacher", note="", total=len(seeds), completed=done)
        for few in missing:
            samples = teacher_samples(denoiser, few, solver, batch, device, lambda n: bar.advance(task, n), group)
            done += len(few)
            bar.update(task, completed=done)  # with what other ranks did
            if not bool(torch.isfinite(samples).all()):
                raise InputError(
                    f"{denoiser.name} with {solver.solver} gave samples that are not finite; check the model"
                )
            if not group.main:
                continue
            file = f"shard-{few[0]:08d}-{few[-1]:08d}.safetensors"
            with atomic(out / file) as temporary:
                save_file({"seeds": torch.tensor(few), "samples": samples.contiguous()}, temporary)
            kept.append({"file": file, "seeds": few, "sha256": sha256(out / file)})
            kept.sort(key=lambda entry: entry["seeds"])
            write_json(out / "index.json", {"format": FORMAT, "made_by": made_by, "shards": kept})
    group.barrier()  # before anybody reads
    return out


def load_teacher_set(out: Path) -> tuple[list[int], Tensor]:
    """Seeds and samples [N, *shape] of a set. Raises InputError if it is missing, incomplete or damaged."""
    seeds: list[int] = []
    samples: list[Tensor] = []
    for entry in load_index(out):
        if not _intact(out, entry):
            raise InputError(f"{out / entry['file']} is missing or damaged; run `gas-engine teacher` again to mend it")
        try:
            samples.append(load_file(out / entry["file"])["samples"])
        except SafetensorError as error:
            raise InputError(f"cannot read {out / entry['file']}: {error}") from None
        seeds += entry["seeds"]
    if not samples:
        raise InputError(f"the teacher set {out} is empty: its index.json names no shards")
    return seeds, torch.cat(samples)


def load_index(out: Path) -> list[dict[str, Any]]:
    """The shards of a set: their ``file``, ``seeds`` and ``sha256``. Raises InputError where there is no set."""
    index = _read_index(out)
    if index is None:
        raise InputError(f"there is no teacher set in {out}")
    return index["shards"]


def _read_index(out: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((out / "index.json").read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']!r}")
        shards = [{"file": str(e["file"]), "seeds": list(e["seeds"]), "sha256": e["sha256"]} for e in index["shards"]]
        return {"made_by": dict(index["made_by"]), "shards": shards}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"{out / 'index.json'} is not the index of a teacher set ({error!r:.200})") from None


def _intact(out: Path, entry: dict[str, Any]) -> bool:
    return (out / entry["file"]).is_file() and sha256(out / entry["file"]) == entry["sha256"]


def run(config: Config) -> None:
    with Group.from_environment() as group:
        device = group.device(config.device)
        denoiser = place(config, open_model(config), device)
        seeds = parse_seeds(config.seeds)
        out = make_teacher_set(
            denoiser, seeds, config, config.out, batch=config.batch, shard=config.shard, device=device, group=group
        )  # fmt: skip
        console.print(f"{len(seeds)} samples of {denoiser.name} in {out}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``gas-engine teacher``."""
    command("teacher", Config, run, argv)


if __name__ == "__main__":
    main()
