"""Draw samples: ``gas-engine sample --model digits --solver solver.safetensors --seeds 0-63 --out DIR``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ._cli import InputError, command, console, parse_seeds, pick_device, progress, writable
from .conditioning import moved, take
from .denoiser import Denoiser, seeded
from .files import atomic
from .models import PlacedModelOptions, open_model, place
from .pictures import can_draw, image_rows, pictures_of
from .rollout import rollout
from .solvers.files import load_solver
from .solvers.named import named_solver
from .tableau import Tableau

COLUMNS, MAX_SHOWN = 8, 256


@dataclass
class Config(PlacedModelOptions):
    """Draw samples with a classical solver or a learned one."""

    solver: str = "unipc"
    """A solver file (.safetensors, or a published .pt), or euler, heun, dpmpp2m, dpmpp3m, unipc, ipndm, deis, ..."""
    steps: int | None = None
    """Network evaluations; needed for classical solvers and for a file of several K, others bring their own."""
    grid: str = "quadratic"
    """Times of a classical solver: logSNR, uniform, quadratic, karras, gits (5 to 8 steps)."""
    t_eps: float | None = None
    """Time at which a classical solver, or a published .pt, stops; the model's unless given."""
    seeds: str | None = None
    """Seeds to sample, such as 0-63; by default 0-63, or one per row of --noise."""
    noise: Path | None = None
    """Initial noise from a .npy file, [N, C, H, W], instead of the seeds' own (which then give the classes only)."""
    classes: str | None = None
    """Classes of a class-conditional model, such as 0-9, repeated over the samples; by default drawn from the seeds."""
    out: Path = field(default=Path("samples"))
    """Directory for samples.png or samples.npy."""
    format: Literal["png", "npy"] = "png"
    """A picture grid of the first 256 (of latents, what the model's decoder makes of them), or float32 [N, C, H, W] in
    the network's range."""
    batch: int = 128
    """Samples at a time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, ..."""


def run(config: Config) -> Path:
    """Sample and write; return the file's path."""
    if config.batch < 1:
        raise InputError(f"--batch must be at least 1, got {config.batch}")
    device = pick_device(config.device)
    denoiser = place(config, open_model(config), device)
    if config.format == "png" and len(denoiser.shape or ()) != 3:
        raise InputError(f"{denoiser.name} makes no pictures (states of shape {denoiser.shape}); use --format npy")
    if config.format == "png":
        can_draw(denoiser)
    tableau = _tableau(config, denoiser)
    noise, cond = _inputs(config, denoiser)
    done: list[Tensor] = []
    with torch.no_grad(), progress() as bar:
        task = bar.add_task("sample", total=len(noise), note="")
        for start in range(0, len(noise), config.batch):
            part = slice(start, start + config.batch)
            here = moved(take(cond, part, len(noise)), device)
            done.append(rollout(denoiser, noise[part].to(device), tableau, here).float().cpu())
            bar.advance(task, len(done[-1]))
    samples = torch.cat(done)
    if not bool(torch.isfinite(samples).all()):
        raise InputError(f"{tableau.name} gave samples that are not finite; try more --steps or another --grid")
    path = writable(config.out) / f"samples.{config.format}"
    if config.format == "npy":
        with atomic(path) as temporary:
            np.save(temporary, samples.numpy())
    else:
        shown = pictures_of(denoiser, samples[:MAX_SHOWN], device)
        rows = [(str(i), shown[i : i + COLUMNS]) for i in range(0, len(shown), COLUMNS)]
        image_rows(path, rows, f"{denoiser.name}, {tableau.name}, {tableau.steps} evaluations", COLUMNS)
    console.print(
        f"{len(samples)} samples with {tableau.name}, {tableau.steps} evaluations each: {path}", soft_wrap=True
    )
    return path


def _tableau(config: Config, denoiser: Denoiser) -> Tableau:
    file = Path(config.solver)
    t_eps = denoiser.t_eps if config.t_eps is None else config.t_eps
    if not file.suffix and not file.is_file():
        if config.steps is None:
            raise InputError(f"--solver {config.solver} needs --steps, the number of network evaluations")
        return named_solver(config.solver, denoiser.schedule, config.steps, config.grid, t_eps)
    published = file.suffix in (".pt", ".pth")
    told = denoiser.told_guidance
    solver = load_solver(file, denoiser.schedule, t_eps if published else config.t_eps, denoiser.name, told)
    if (solver.schedule.kind == "flow") != (denoiser.schedule.kind == "flow"):
        raise InputError(
            f"{file} is a solver for {solver.schedule}, and {denoiser.name} runs on {denoiser.schedule}; give another"
        )
    try:
        solver.check_steps(config.steps)
        solver.check_guidance(told)
    except ValueError as error:
        raise InputError(f"{file} is {error}") from None
    with torch.no_grad():
        return solver.at(config.steps, told).tableau(denoiser.prediction)


def _inputs(config: Config, denoiser: Denoiser) -> tuple[Tensor, Any]:
    rows = None if config.noise is None else _read_noise(config.noise, denoiser)
    seeds = parse_seeds(config.seeds or f"0-{(64 if rows is None else len(rows)) - 1}")
    if rows is not None and len(rows) != len(seeds):
        raise InputError(f"{config.noise} holds {len(rows)} rows of noise, but --seeds names {len(seeds)}")
    noise, cond = seeded(denoiser, seeds)
    if config.classes is not None:
        if not denoiser.classes:
            raise InputError(f"--classes was given, but {denoiser.name} takes no classes")
        wanted = torch.tensor(parse_seeds(config.classes))
        if int(wanted.max()) >= denoiser.classes:
            raise InputError(f"classes run from 0 to {denoiser.classes - 1}, got {config.classes}")
        drawn = wanted[torch.arange(len(seeds)) % len(wanted)]
        cond = {**cond, "cond": drawn} if isinstance(cond, dict) else drawn
    return (noise if rows is None else rows), cond


def _read_noise(path: Path, denoiser: Denoiser) -> Tensor:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read the noise {path}: {error}") from None
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f" or rows.shape[1:] != denoiser.shape or not len(rows):
        seen = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        needed = ", ".join(map(str, denoiser.shape or ()))
        raise InputError(f"{path} holds {seen}; {denoiser.name} needs floating point noise [N, {needed}]")
    bad = int((~np.isfinite(rows)).sum())
    if bad:
        raise InputError(f"{path} holds {bad} numbers that are not finite")
    return torch.from_numpy(rows.astype(np.float32))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``gas-engine sample``."""
    command("sample", Config, run, argv)


if __name__ == "__main__":
    main()
