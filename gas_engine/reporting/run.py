"""A run directory as plain data: numbers, words and images, each part there or with the reason why not."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .._cli import InputError
from ..schedule import Schedule
from ..solvers import GRIDS, grid, load_solver
from ..training.directory import RunDirectory
from .pictures import SAMPLES, read_samples

Data = dict[str, Any]
READINGS, POINTS, ROWS = 160, 600, 400  # of the history, of a curve, of a table


def read_run(path: Path) -> Data:
    """What a page shows of the run in ``path``. Raises InputError for a directory that holds none.

    Parts that are missing, unfinished or damaged are ``{"missing": sentence}``: a run may be read while it trains.
    """
    path, directory = Path(path), RunDirectory(Path(path))
    if not directory.exists():
        raise InputError(f"{path} is no run directory (it has no config.json); name one that gas-engine train wrote")
    config = directory.config()
    solver, schedule, t_eps = _solver(directory)
    metrics = _part(lambda: _metrics(directory.metrics), "No metrics have been written yet.")
    steps = [curve["steps"][-1] for curve in metrics.values() if isinstance(curve, dict)]
    student = str(config.get("student", "solver"))
    adversarial = "gas" if student == "gs" else f"{student}, adversarial"
    said = "Its samples appear when training is done, for models of images."
    return {
        "name": path.resolve().name,
        "model": str(config.get("model", "")),
        "family": adversarial if config.get("adversarial") else student,
        "steps": config.get("steps"),
        "updates": max(steps, default=0),
        "planned": config.get("iterations"),
        "finished": (path / "comparison.csv").exists(),
        "teacher": config.get("teacher"),
        "solver": solver,
        "options": {name: _said(value) for name, value in _flat(config).items()},
        "metrics": metrics,
        "histories": _part(
            lambda: _histories(directory.history, schedule, t_eps), "No readings of the solver have been written yet."
        ),
        "samples": _part(lambda: read_samples(path / SAMPLES), f"This run keeps no pictures of samples. {said}"),
        "comparison": _part(lambda: _table(path / "comparison.csv"), "The comparison is made when training is done."),
        "evaluation": _part(lambda: _table(path / "evaluation.csv"), "No evaluation was written here."),
        "memory": _part(lambda: _columns(path / "memory.csv"), "This run did not record the memory of an update."),
        "plan": _part(
            lambda: _table(path / "plan.csv"),
            "No memory budget was given (--memory-budget 8GiB), so nothing was planned.",
        ),
    }  # fmt: skip


def _part(read: Callable[[], Data], missing: str) -> Data:
    try:
        return read()
    except FileNotFoundError:
        return {"missing": missing}
    except (OSError, ValueError, TypeError, KeyError, IndexError, SafetensorError, csv.Error) as error:
        return {"missing": f"This part could not be read: {str(error)[:200] or type(error).__name__}."}


def _solver(directory: RunDirectory) -> tuple[Data, Schedule | None, float]:
    """The finished solver, or the nearest so far: facts, and the schedule that its times are of."""
    for path in (directory.solver, directory.best):
        try:
            solver = load_solver(path)
        except ValueError:
            continue
        facts = {name: _said(value) for name, value in solver.facts.items() if name not in ("schedule", "metrics")}
        facts |= {"schedule": solver.schedule.kind, "learned numbers": f"{sum(p.numel() for p in solver.parameters())}"}
        facts |= {"file": path.name, "bytes": f"{path.stat().st_size}"}
        return facts, solver.schedule, solver.t_eps
    return {"missing": "There is no solver file yet."}, None, 1e-3


def _histories(path: Path, schedule: Schedule | None, t_eps: float) -> Data:
    """Readings of times, told times and tableau by the number of steps, each with the grids of that many.

    Levels are noise-to-signal ratios sigma / alpha, where the schedule is known.
    """
    found: dict[int, list[Data]] = {}
    for row in _lines(path):
        told, times = _numbers(row["told"]), _numbers(row["times"])
        k = len(told)
        a, b = ([_numbers(line) for line in row[name]] for name in ("A", "B"))
        if k < 1 or len(times) != k + 1 or any(len(m) != k or any(len(line) != k for line in m) for m in (a, b)):
            raise ValueError(f"a reading of {path.name} has rows of other lengths")
        found.setdefault(k, []).append({"step": int(row["step"]), "times": times, "told": told, "A": a, "B": b})
    if not found:
        raise FileNotFoundError
    histories = []
    for k, rows in sorted(found.items()):
        rows = _thinned(rows, READINGS)
        grids = {}
        if schedule is not None:
            for row in rows:
                row["levels"], row["told_levels"] = _levels(schedule, row["times"]), _levels(schedule, row["told"])
            for name in GRIDS:
                times = grid(name, schedule, k, t_eps).tolist()
                grids[name] = {"times": _rounded(times), "levels": _levels(schedule, times)}
        histories.append({"steps": k, "rows": rows, "grids": grids})
    return {"by_steps": histories}


def _levels(schedule: Schedule, times: list[float]) -> list[float | None]:
    alpha, sigma, _ = schedule(torch.tensor(times, dtype=torch.float64))
    return [value if math.isfinite(value) else None for value in _rounded((sigma / alpha).tolist())]


def _metrics(path: Path) -> Data:
    """A curve for each column: steps and finite values."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in _lines(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((int(row["step"]), float(f"{value:.6g}")))
    if not curves:
        raise FileNotFoundError
    thin = {name: _thinned(points, POINTS) for name, points in curves.items()}
    return {name: {"steps": [s for s, _ in points], "values": [v for _, v in points]} for name, points in thin.items()}


def _lines(path: Path) -> list[Data]:
    """Rows of JSON; the last may still be in the middle of being written."""
    lines, rows = path.read_text(errors="replace").splitlines(), []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            if line is lines[-1]:
                break
            raise
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"a row of {path.name} names no update")
        rows.append(row)
    return rows


def _table(path: Path) -> Data:
    with open(path, newline="", errors="replace") as file:
        head, *rows = csv.reader(file)
    whole = [row for row in rows if len(row) == len(head)]
    if not whole:
        raise ValueError(f"{path.name} has no rows")
    return {"columns": head, "rows": whole[:ROWS], "count": len(whole)}


def _columns(path: Path) -> Data:
    """A table of numbers by its columns."""
    table = _table(path)
    values = zip(*([int(cell) for cell in row] for row in table["rows"]), strict=True)
    columns = dict(zip(table["columns"], map(list, values), strict=True))
    return {"operation": columns.pop("operation"), "bytes": columns}


def _flat(options: Data, stem: str = "") -> Data:
    flat: Data = {}
    for name, value in options.items():
        flat |= _flat(value, f"{stem}{name}.") if isinstance(value, dict) else {f"{stem}{name}": value}
    return flat


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _numbers(values: Any) -> list[float]:
    numbers = _rounded(values)
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a reading is not finite")
    return numbers


def _rounded(values: list[float]) -> list[float]:
    """Six digits, more than a drawing shows."""
    return [float(f"{float(value):.6g}") for value in values]


def _thinned(rows: list[Any], most: int) -> list[Any]:
    """Evenly chosen rows with the first and the last."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
