"""Solver files: a few kilobytes of safetensors or JSON that describe themselves, and the published students' .pt."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .._safe_pickle import read_pickle
from ..files import atomic, tensors_sha256, write_text
from ..schedule import Schedule
from ._times import MAX_STEPS, LearnedTimes
from .any_steps import AnyStepsSolver
from .belm import BELMSolver
from .bns import BNSSolver
from .dyweight import DyWeightSolver
from .generalized import GeneralizedSolver
from .ld3 import LD3Solver
from .s4s import AlternatingS4SSolver, S4SSolver

FORMAT = "gas_engine.solver/1"
DERIVED = "follows from the parameters"
STUDENTS = (GeneralizedSolver, S4SSolver, AlternatingS4SSolver, LD3Solver, BNSSolver, DyWeightSolver, BELMSolver)
FAMILIES: dict[str, type[LearnedTimes]] = {cls.family: cls for cls in STUDENTS}
READABLE: dict[str, type[LearnedTimes]] = {**FAMILIES, AnyStepsSolver.family: AnyStepsSolver}


def save_solver(solver: LearnedTimes, path: Path | str, **facts: Any) -> None:
    """Write a solver with everything needed to use it; ``facts`` (model, metrics, version, ...) are kept as JSON."""
    metadata = _metadata(solver, facts)
    data = save(solver.state_dict(), {key: json.dumps(value) for key, value in metadata.items()})
    with atomic(path) as temporary:
        temporary.write_bytes(_sorted_header(data))


@torch.no_grad()
def write_readable(solver: LearnedTimes, path: Path | str, **facts: Any) -> None:
    """Write a solver as JSON that ``load_solver`` reads back to the bit, with what follows from its parameters: times
    of states and network, and the tableau for data estimates D, x[n+1] = sum_j A[n][j] x[j] + B[n][j] D[j]; by K
    where there are several, and of a range of guidance at its middle."""
    each = {str(one.steps): _follows(one) for one in solver.each()}
    follows = each if len(each) > 1 else each[str(solver.steps)]
    parameters = {name: value.tolist() for name, value in solver.state_dict().items()}
    content = {**_metadata(solver, facts), "parameters": parameters, DERIVED: follows}
    write_text(path, _with_short_rows(content) + "\n")


def _follows(solver: LearnedTimes) -> dict[str, Any]:
    tableau = solver.tableau("data")
    lower = {name: [row[: n + 1] for n, row in enumerate(getattr(tableau, name).tolist())] for name in "AB"}
    return {"times": solver.times().tolist(), "told_times": tableau.t_net.tolist(), **lower}


def write_published(solver: LearnedTimes, path: Path | str, step: int = 0) -> None:
    """Write a student in the format of the published ones, {ema: {shadow_params: [...]}, model, optim, step}.

    Theta, xi, c_1, a_1, c_2, a_2, ..., float64, which ``load_solver`` reads back to the bit. The format says neither
    schedule nor t_eps. Raises ValueError for what it cannot say: another family or form, an order below K.
    """
    whole = {"order": solver.steps, "base": "dpmpp3m", "theory": True}
    if not isinstance(solver, GeneralizedSolver) or any(getattr(solver, k) != v for k, v in whole.items()):
        said = ", ".join(f"{name} {getattr(solver, name)}" for name in ("family", *solver.settings))
        raise ValueError(
            f"the published format holds Generalized Solvers with theory and of full order only, not this one "
            f"({said}); write safetensors or JSON instead"
        )
    a, c = (value.detach().clone().unbind(1) for value in (solver.phi_a, solver.phi_c))
    rows = [solver.theta.detach().clone(), solver.xi.detach().clone()]
    rows += [row.contiguous() for pair in zip(c, a, strict=True) for row in pair]
    content = {"ema": {"shadow_params": rows}, "model": {}, "optim": {}, "step": step}
    with atomic(path) as temporary:
        torch.save(content, temporary)


def load_solver(
    path: Path | str, schedule: Schedule | None = None, t_eps: float | None = None, model: str | None = None,
    guidance: Any = None,
) -> LearnedTimes:  # fmt: skip
    """Read a solver from ``solver.safetensors``, from its readable ``.json``, or from a published student's ``.pt``.

    A ``.pt`` (``{"ema": {"shadow_params": [theta, xi, c_1, a_1, c_2, a_2, ...]}}``; nothing in it is executed) says
    nothing about its schedule, so it needs ``schedule`` and ``t_eps``. For other files these two, ``model``
    and ``guidance`` are what the caller is about to use: where the file was trained for others, a warning names both,
    and the file's own schedule is kept. The facts in the file are ``solver.facts``.

    Raises ValueError for a file that is missing, truncated, corrupted or no solver.

        solver = load_solver("runs/digits/solver.safetensors")
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no solver file {path}")
    if path.suffix in (".pt", ".pth"):
        if schedule is None or t_eps is None:
            raise ValueError(f"{path} does not say what it was trained for: give schedule= and t_eps=")
        return _published(path, schedule, t_eps)
    metadata, tensors = _read(path)
    family = metadata.get("family")
    if family not in READABLE:
        raise ValueError(f"{path} is a solver of the family {family!r}; known: {', '.join(READABLE)}")
    try:
        solver = READABLE[family].from_config(metadata)
        _fill(solver, tensors, path)
    except ValueError as error:
        raise ValueError(f"{path} is not a solver that can be used: {error}") from None
    except Exception as error:  # numbers of the wrong types fail in any way
        raise ValueError(f"{path} is not a complete solver file: {error!r:.200} is missing or wrong") from None
    solver.facts = {key: metadata[key] for key in metadata.keys() - {"format"}}
    trained_for = metadata.get("model")
    if model is not None and trained_for is not None and model != trained_for:
        warnings.warn(f"{path} was trained for the model {trained_for!r} and is used with {model!r}", stacklevel=2)
    trained_at = metadata.get("guidance")
    constant = solver.guidance_range is None  # another refuses a scale that it has no tableau for
    if constant and guidance is not None and trained_at is not None and not _within(guidance, trained_at):
        warnings.warn(f"{path} was trained at guidance {trained_at} and is used at {guidance}", stacklevel=2)
    if schedule is not None and schedule != solver.schedule:
        warnings.warn(f"{path} was trained for {solver.schedule} and is used with {schedule}", stacklevel=2)
    if t_eps is not None and t_eps != solver.t_eps:
        warnings.warn(f"{path} was trained to t_eps={solver.t_eps} and is used with t_eps={t_eps}", stacklevel=2)
    return solver


def _within(scale: Any, trained: Any) -> bool:
    """Whether a scale of guidance is the one that a solver was trained at, or lies in its range."""
    low, high = trained if isinstance(trained, list | tuple) else (trained, trained)
    return all(low <= s <= high for s in (scale if isinstance(scale, list | tuple) else (scale,)))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        metadata, tensors = _read_json(path) if path.suffix == ".json" else _read_safetensors(path)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the solver {path}: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a solver of this package (format {metadata.get('format')!r})")
    if metadata.pop("checksum", None) != tensors_sha256(tensors, metadata):
        raise ValueError(f"{path} is corrupted: its numbers do not match its checksum")
    return metadata, tensors


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        raw = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return {key: json.loads(value) for key, value in raw.items()}, tensors


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
        raise ValueError("it holds no parameters")
    try:
        parameters = content.pop("parameters")
        tensors = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in parameters.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"its parameters are no numbers ({error})") from None
    content.pop(DERIVED, None)
    return content, tensors


def _metadata(solver: LearnedTimes, facts: dict[str, Any]) -> dict[str, Any]:
    # What rebuilds the solver comes first, and last: no fact of the same name takes its place.
    metadata = {"format": FORMAT, **solver.config(), **facts, **solver.config()}
    return metadata | {"checksum": tensors_sha256(solver.state_dict(), metadata)}


def _with_short_rows(value: Any, depth: int = 0) -> str:
    """JSON with a line for each entry and each row of numbers."""
    if isinstance(value, dict):
        inner, end = "\n" + " " * (depth + 1), "\n" + " " * depth
        entries = (f"{json.dumps(key)}: {_with_short_rows(entry, depth + 1)}" for key, entry in value.items())
        return "{" + ",".join(inner + entry for entry in entries) + end + "}"
    if isinstance(value, list) and any(isinstance(row, list) for row in value):
        inner, end = "\n" + " " * (depth + 1), "\n" + " " * depth
        return "[" + ",".join(inner + json.dumps(row) for row in value) + end + "]"
    return json.dumps(value)


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors bytes with sorted metadata, whose order the format leaves to chance: equal solvers give
    equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _published(path: Path, schedule: Schedule, t_eps: float) -> GeneralizedSolver:
    try:
        rows = read_pickle(path)["ema"]["shadow_params"]
        rows = [torch.as_tensor(row).detach() for row in rows[: 3 + 2 * MAX_STEPS]]
        if any(row.numel() > MAX_STEPS for row in rows):
            raise ValueError(f"its tensors are {max(row.numel() for row in rows):,} numbers long")
        rows = [row.to(torch.float64) for row in rows]
    except Exception as error:  # a foreign file fails in any way
        reason = str(error) if isinstance(error, ValueError) else f"no ema/shadow_params: {type(error).__name__}"
        raise ValueError(f"{path} is not a published student ({reason})") from None
    if len(rows) < 4:
        raise ValueError(f"{path} holds {len(rows)} tensors; a published student of K steps holds 2 + 2K")
    theta, xi, *corrections = rows
    steps, order = xi.numel(), len(corrections) // 2
    if not 1 <= order <= steps <= MAX_STEPS:
        raise ValueError(f"{path} holds {len(rows)} tensors for {steps} steps; a published student holds 2 + 2K")
    solver = GeneralizedSolver(steps, schedule, t_eps, order)
    stacked = {"phi_c": corrections[0::2], "phi_a": corrections[1::2]}
    if any(row.shape != (steps,) for row in corrections) or len(corrections) % 2:
        raise ValueError(f"{path} does not hold one coefficient per step and lag")
    _fill(solver, {"theta": theta, "xi": xi, **{k: torch.stack(v, 1) for k, v in stacked.items()}}, path)
    solver.facts = {"family": "gs", "published": str(path)}
    return solver


def _fill(solver: LearnedTimes, tensors: dict[str, Tensor], path: Path) -> None:
    for name, parameter in solver.named_parameters():
        value = tensors[name]
        if value.shape != parameter.shape or not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{path}: {name} must be {tuple(parameter.shape)} finite numbers, got shape {tuple(value.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(value)
