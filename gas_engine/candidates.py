"""The solvers that an evaluation is asked for: files, names, and the best classical ones, at several K."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import comparison
from ._cli import InputError, parse_seeds, progress
from .denoiser import Denoiser
from .distributed import Group
from .files import tensors_sha256, write_json
from .solvers import LearnedTimes, load_solver
from .solvers.named import ALIASES, MAKERS
from .tableau import Tableau
from .teacher import TeacherSolver, teacher_samples

DEFAULT_STEPS = "4,6,8,10"


@dataclass(frozen=True)
class Candidate:
    """One solver at one number of evaluations."""

    name: str
    setting: str
    steps: int
    tableau: Tableau

    @property
    def checksum(self) -> str:
        """Of all that its samples depend on, beside the model and the noise."""
        tableau = self.tableau
        return tensors_sha256({name: getattr(tableau, name) for name in ("A", "B", "t_net", "c_in")})


@dataclass(frozen=True)
class Choice:
    """What was asked for by one word: its candidates at K evaluations; ``at`` is None for ``classical``."""

    name: str
    steps: Sequence[int]
    at: Callable[[int], Candidate] | None = None
    train_seeds: Sequence[int] = ()


def open_choices(
    words: Sequence[str], steps: str | None, denoiser: Denoiser, grid: str, t_eps: float | None
) -> list[Choice]:
    """Read the files and check the names, at all K that are asked for. Raises ValueError for what cannot be used."""
    asked = None if steps is None else parse_steps(steps)
    files = {word: _file(word, denoiser) for word in words if word != "classical" and not _named(word)}
    own = sorted({k for solver, *_ in files.values() for k in solver.steps_range})
    every = asked or own or parse_steps(DEFAULT_STEPS)
    names = _names(files)
    choices = []
    for word in dict.fromkeys(words):
        if word == "classical":
            choices.append(Choice(word, every))
        elif word in files:
            solver, path = files[word]
            mine = [k for k in solver.steps_range if k in every]
            if not mine:
                raise InputError(f"{path} is a solver of {_said(solver)} evaluations, but --steps {steps} was given")
            choices.append(
                Choice(names[word], mine, _learned(solver, names[word], denoiser), _train_seeds(solver, path))
            )
        else:
            choices.append(Choice(word, every, _classical(word, denoiser, grid, t_eps)))
            for k in every:
                choices[-1].at(k)  # type: ignore[misc]  # refuse before sampling
    return choices


def parse_steps(text: str) -> list[int]:
    """``"4,6-8"`` -> [4, 6, 7, 8]. Raises InputError for anything else."""
    steps: list[int] = []
    if not re.search("[0-9]{5}", text):  # before a long range is counted out
        with contextlib.suppress(InputError):
            steps = sorted(parse_seeds(text))
    if not steps or steps[0] < 1 or steps[-1] > 1000:
        raise InputError(f"--steps must look like 4,6,8,10 or 4-10, got {text!r}")
    return steps


def candidates(
    choices: Sequence[Choice], denoiser: Denoiser, teacher: TeacherSolver, selection: Sequence[int], memory: Path,
    batch: int, device: torch.device, group: Group,
) -> list[Candidate]:  # fmt: skip
    """All of them, by K within each choice; the best classical solvers, on the seeds ``selection``, are kept in the
    file ``memory``."""
    found = []
    for choice in choices:
        for k in choice.steps:
            if choice.at is not None:
                found.append(choice.at(k))
                continue
            best = _best(k, denoiser, teacher, list(selection), memory, batch, device, group)
            for family, variant in best.items():
                found.append(Candidate(family, str(variant), k, variant.tableau(denoiser.schedule, k)))
    return found


def _best(
    steps: int, denoiser: Denoiser, teacher: TeacherSolver, seeds: list[int], memory: Path, batch: int,
    device: torch.device, group: Group,
) -> dict[str, comparison.Variant]:  # fmt: skip
    facts = [denoiser.fingerprint(), denoiser.facts(), asdict(teacher), seeds, comparison.T_EPS, [*MAKERS]]
    key = f"{steps}-{tensors_sha256({}, facts)[:16]}"
    known = group.first(lambda: _read(memory))
    if key not in known:
        samples = teacher_samples(denoiser, seeds, teacher, batch, device, group=group)
        selection = comparison.Samples.of(denoiser, seeds, samples, device)
        with progress() as bar:
            task = bar.add_task(f"best classical solvers at {steps}", total=comparison.VARIANTS, note="")
            best = comparison.best_variants(denoiser, steps, selection, batch, lambda: bar.advance(task), group)
            bar.update(task, completed=comparison.VARIANTS)
        known = {**known, key: best}
        if group.main:
            write_json(memory, known)
    return {family: comparison.Variant(*variant) for family, variant in known[key].items()}


def _read(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text())
        return {key: {f: comparison.Variant(*v) for f, v in best.items()} for key, best in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # chosen again


def _named(word: str) -> bool:
    return word in MAKERS or word in ALIASES


def _file(word: str, denoiser: Denoiser) -> tuple[LearnedTimes, Path]:
    path = Path(word)
    if path.is_dir():
        path = path / "solver.safetensors"
    if not path.is_file() and not path.suffix:
        known = ", ".join(sorted({*MAKERS, *ALIASES}))
        raise InputError(f"there is no solver {word!r}: give a run directory, a file, classical, or one of {known}")
    told = denoiser.told_guidance
    published = denoiser.t_eps if path.suffix in (".pt", ".pth") else None
    solver = load_solver(path, denoiser.schedule, published, denoiser.name, told)
    if (solver.schedule.kind == "flow") != (denoiser.schedule.kind == "flow"):
        raise InputError(f"{path} is a solver for {solver.schedule}, and {denoiser.name} runs on {denoiser.schedule}")
    try:
        solver.check_guidance(told)
    except ValueError as error:
        raise InputError(f"{path} is {error}") from None
    return solver, path


def _said(solver: LearnedTimes) -> str:
    steps = solver.steps_range
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _learned(solver: LearnedTimes, name: str, denoiser: Denoiser) -> Callable[[int], Candidate]:
    @torch.no_grad()
    def at(steps: int) -> Candidate:
        several = [_said(solver)] if len(solver.steps_range) > 1 else []
        several += ["guidance {:g} to {:g}".format(*solver.guidance_range)] if solver.guidance_range else []
        told = denoiser.told_guidance
        tableau = solver.at(steps, told).tableau(denoiser.prediction)
        return Candidate(name, ", ".join([solver.family, *several]), steps, tableau)

    return at


def _classical(name: str, denoiser: Denoiser, grid: str, t_eps: float | None) -> Callable[[int], Candidate]:
    variant = comparison.Variant(ALIASES.get(name, name), grid, denoiser.t_eps if t_eps is None else t_eps)
    return lambda steps: Candidate(name, str(variant), steps, variant.tableau(denoiser.schedule, steps))


def _names(files: dict[str, tuple[LearnedTimes, Path]]) -> dict[str, str]:
    """Solvers are called as their run directories, or by their paths where two would be called alike."""
    names = {}
    for word, (_, path) in files.items():
        parent = path.resolve().parent.name
        names[word] = parent if path.stem == "solver" else f"{parent}/{path.stem}"
    alike = [word for word, name in names.items() if [*names.values()].count(name) > 1]
    return names | {word: str(files[word][1]) for word in alike}


def _train_seeds(solver: LearnedTimes, path: Path) -> Sequence[int]:
    """Those that the file names, or the run that it lies in (of solvers before their end); else none, as of rows of a
    published set."""
    try:
        said = solver.facts.get("train_seeds")
        if said is None and "version" not in solver.facts:
            config = json.loads((path.parent / "config.json").read_text())
            published = config.get("teacher_set") and Path(config["teacher_set"]).is_file()
            said = None if published else config["train_seeds"]
        return [] if said is None else parse_seeds(said)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
