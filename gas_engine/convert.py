"""Solvers and models out: ``gas-engine convert solver.safetensors --to diffusers --model sd15 --out scheduler``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch._subclasses.fake_tensor import FakeTensorMode

from ._cli import InputError, command, console
from .adapters import load_denoiser
from .architectures import ARCHITECTURES
from .denoiser import Denoiser
from .schedule import Schedule
from .solvers import LearnedTimes, load_solver, save_solver
from .solvers.files import write_published, write_readable


@dataclass
class Config:
    """Write solvers for other programs, or read other programs' files."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Solver files (.safetensors, .json, a published .pt), of one K each; for --to hub a run directory; for --to
    safetensors also an EDM network, an R3GAN snapshot, a teacher set or a checkpoint."""
    to: Literal["safetensors", "json", "diffusers", "comfyui", "published", "hub"] = "safetensors"
    """safetensors or json, which hold everything; a scheduler of diffusers; a folder of ComfyUI's custom_nodes (also
    a sampler for k-diffusion); a .pt in the published students' format; a directory for the Hugging Face Hub."""
    out: Path = field(default_factory=lambda: Path("converted"))
    """The file, or the directory, to write."""
    model: str | None = None
    """What the solver is for, where its file does not say (a published .pt): as train takes it, or sd15, sdxl, sd3,
    flux, ldm4, dit-xl2, cifar10, ...: says prediction type, schedule and t_eps."""
    prediction: Literal["noise", "data", "velocity", "flow"] | None = None
    """What the network predicts, for --to diffusers and hub, where neither the file nor --model says so."""
    schedule: str | None = None
    """Of a published .pt, instead of --model: flow:SHIFT, vp_linear:BETA_0:BETA_1, or a solver file with the same."""
    t_eps: float | None = None
    """Of a published .pt: the time at which it stops; the model's, or 1e-3, unless given."""
    steps: int | None = None
    """Of a solver of several K: the one to write; all of them unless given."""
    guidance: float | None = None
    """Of a solver for a range of guidance: the scale to write it for."""


def run(config: Config) -> list[Path]:
    """Convert; return what was written."""
    if not config.files:
        raise InputError("give at least one file to convert")
    if config.to == "hub":
        written = _hub(config)
    elif not _holds_solver(config.files[0]):
        written = _third_party(config)
    else:
        written = _solvers(config)
    for path in written:
        console.print(f"{path}", soft_wrap=True, highlight=False)
    return written


def _solvers(config: Config) -> list[Path]:
    from .export.directories import write_comfyui, write_diffusers

    solvers = [one for path in config.files for one in _chosen(_open(path, config), path, config)]
    if config.to == "diffusers":
        return [write_diffusers(solvers, _prediction(config, solvers), config.out)]
    if config.to == "comfyui":
        return [write_comfyui(solvers, config.out)]
    if len(solvers) > 1:
        raise InputError(f"--to {config.to} writes one solver, got {len(solvers)}; diffusers and comfyui take several")
    (solver,) = solvers
    facts = {name: value for name, value in solver.facts.items() if name not in solver.config()}
    if config.to == "published":
        write_published(solver, config.out)
    else:
        (save_solver if config.to == "safetensors" else write_readable)(solver, config.out, **facts)
    return [config.out]


def _chosen(solver: LearnedTimes, path: Path, config: Config) -> list[LearnedTimes]:
    """The solver itself, or those of the K and of the scale that are asked for; programs elsewhere have one scale."""
    scale = config.guidance
    if scale is not None and solver.guidance_range is None:
        raise InputError(f"{path} is a solver for one guidance, but --guidance {scale:g} was given; leave it out")
    whole = solver.guidance_range is None or config.to in ("safetensors", "json")
    if config.steps is None and scale is None and whole:
        return [solver]
    try:
        solver.check_guidance(scale)
        if config.to not in ("diffusers", "comfyui"):
            solver.check_steps(config.steps)  # one file is of one K
        return [solver.at(steps, scale) for steps in (solver.steps_range if config.steps is None else [config.steps])]
    except ValueError as error:
        raise InputError(f"{path} is {error}") from None


def _hub(config: Config) -> list[Path]:
    from .export.hub import finished, write_hub

    if len(config.files) > 1 or not config.files[0].is_dir():
        raise InputError(f"--to hub takes one run directory, got {', '.join(map(str, config.files))}")
    solver = finished(config.files[0])
    prediction = None if solver.schedule.kind == "vp_linear" else _prediction(config, [solver])
    return [write_hub(config.files[0], config.out, prediction)]


def _third_party(config: Config) -> list[Path]:
    from .adapters.converting import kind_of, to_safetensors

    (path, *others) = config.files
    if config.to != "safetensors" or others:
        raise InputError(
            f"{path} is no solver but {kind_of(path)}; such files convert one by one with --to safetensors"
        )
    return to_safetensors(path, config.out)


def _holds_solver(path: Path) -> bool:
    """Whether to read it as a solver; a .pt may be anything that torch.save writes."""
    if path.suffix in (".safetensors", ".json") or not path.is_file():
        return True
    from .adapters.converting import kind_of

    return path.suffix in (".pt", ".pth") and kind_of(path) == "student"


def _open(path: Path, config: Config) -> LearnedTimes:
    if path.suffix not in (".pt", ".pth"):
        return load_solver(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if config.model is None and config.schedule is None:
        raise InputError(f"{path} does not say what it was trained for; give --model, or --schedule and --t-eps")
    model = None if config.model is None else _model(config.model)
    schedule = model.schedule if config.schedule is None and model is not None else _schedule(config.schedule or "")
    solver = load_solver(path, schedule, config.t_eps or (model.t_eps if model is not None else 1e-3))
    solver.facts["model"] = config.model
    return solver


@functools.cache
def _model(name: str) -> Denoiser:
    bundled = ARCHITECTURES.get(name)
    with FakeTensorMode(allow_non_fake_inputs=True) if bundled else nullcontext():
        return bundled.denoiser(small=True) if bundled else load_denoiser(name)


def _prediction(config: Config, solvers: Sequence[LearnedTimes]) -> str:
    """As the option says, or the files, or the model, which is loaded for it."""
    said = {config.prediction, *(solver.facts.get("prediction") for solver in solvers)} - {None}
    other = next((s.facts["model"] for s in solvers if s.facts.get("model") not in (None, config.model)), None)
    if config.model is not None and other is not None and config.model not in ARCHITECTURES:
        warnings.warn(f"the solver was trained for the model {other!r}, not for {config.model!r}", stacklevel=2)
    if len(said) > 1 and config.prediction is not None:
        raise InputError(
            f"--prediction {config.prediction} was given, but a file says {(said - {config.prediction}).pop()}"
        )
    if len(said) > 1:
        raise InputError(f"the files are for networks of different predictions: {', '.join(sorted(map(str, said)))}")
    if said:
        return str(said.pop())
    if config.model is None:
        raise InputError("the file does not say what the network predicts; give --model, or --prediction noise, ...")
    return _model(config.model).prediction


def _schedule(text: str) -> Schedule:
    path = Path(text)
    if path.is_file():
        return load_solver(path).schedule
    kind, *numbers = text.split(":")
    makers: dict[str, Any] = {"flow": Schedule.flow, "vp_linear": Schedule.vp_linear}
    try:
        return makers[kind](*map(float, numbers))
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"--schedule must be flow:SHIFT, vp_linear:BETA_0:BETA_1 or a solver file, got {text!r} ({error})"
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``gas-engine convert``."""
    command("convert", Config, run, argv)


if __name__ == "__main__":
    main()
