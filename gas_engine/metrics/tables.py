"""An evaluation as CSV, as Markdown, in the terminal, and as pictures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib import ticker
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from .._cli import console
from ..files import write_text
from ..pictures import save_figure
from .meter import METRICS, Measured
from .spectrum import rings

COLUMNS = ("model", "solver", "setting", "steps", "samples", *METRICS)
WIDTH = 100  # of a terminal
# What the terminal shows, as far as it fits: heading and format.
SHOWN = {
    "l1": ("L1", ".4f"), "psnr": ("PSNR", ".1f"), "lpips": ("LPIPS", ".4f"), "fd_data": ("FD data", ".4g"),
    "fd_teacher": ("FD teacher", ".3g"), "kid_data": ("KID", ".3g"), "precision": ("prec", ".3f"),
    "recall": ("recall", ".3f"), "coverage": ("cover", ".3f"), "detail": ("detail", ".3f"),
}  # fmt: skip
PLOTTED = {
    "l1": "L1 to the teacher", "lpips": "LPIPS to the teacher", "fd_data": "Frechet distance to the data",
    "fd_teacher": "Frechet distance to the teacher", "recall": "recall", "detail": "fine detail / teacher's",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What one solver is at one number of evaluations."""

    solver: str
    setting: str
    steps: int
    scores: dict[str, float | None]
    measured: Measured

    @property
    def samples(self) -> int:
        return int(self.measured["count"])

    @property
    def spectrum(self) -> Tensor | None:
        """Mean power per ring of frequencies, [R]."""
        return _spectrum(self.measured)


def write(
    out: Path, rows: Sequence[Row], data: Measured | None, model: str, teacher_steps: int, wanted: Sequence[str],
    shape: tuple[int, ...] | None,
) -> None:  # fmt: skip
    """All files of an evaluation, and its table in the terminal; the last row is the teacher's."""
    write_text(out / "evaluation.csv", as_csv(rows, model))
    write_text(out / "evaluation.md", as_markdown(rows, wanted))
    _plot(out / "evaluation.png", rows, f"{model}: against a teacher of {teacher_steps} evaluations")
    files = "evaluation.csv  evaluation.md  evaluation.png"
    if shape is not None and rows[-1].spectrum is not None:
        write_text(out / "spectrum.csv", spectrum_csv(rows, data, model, shape))
        _plot_spectrum(out / "spectrum.png", rows, data, model, shape)
        files += "  spectrum.csv  spectrum.png"
    console.print(as_rich(rows, f"{model}, {rows[-1].samples} samples"))
    console.print(f"written   {out}: {files}", soft_wrap=True)


def as_csv(rows: Sequence[Row], model: str) -> str:
    """One line per solver and K; empty where a figure was not asked for or cannot be had."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        numbers = [_number(row.scores.get(name), ".6g") for name in METRICS]
        writer.writerow([model, row.solver, row.setting, row.steps, row.samples, *numbers])
    return text.getvalue()


def as_markdown(rows: Sequence[Row], wanted: Sequence[str]) -> str:
    """The same as a Markdown table, of the columns that hold anything."""
    names = [name for name in wanted if any(row.scores.get(name) is not None for row in rows)]
    lines = [["solver", "setting", "steps", *names], ["---", "---", *["---:"] * (1 + len(names))]]
    for row in rows:
        lines.append([row.solver, row.setting, str(row.steps), *(_number(row.scores[n], ".4g") for n in names)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_rich(rows: Sequence[Row], title: str) -> Table:
    """The columns that matter most, as many as fit a terminal; by K, the nearest to the teacher first."""
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1))
    table.add_column("K", justify="right")
    name_width = min(30, max(len(row.solver) for row in rows))
    table.add_column("solver", overflow="ellipsis", no_wrap=True, width=name_width)
    left = min(WIDTH, console.width) - 5 - name_width
    shown = []
    for name, (head, form) in SHOWN.items():
        cells = [_number(row.scores.get(name), form) for row in rows]
        width = 2 + max(map(len, [head, *cells]))
        if any(cells) and width <= left:
            shown.append((name, form))
            table.add_column(head, justify="right", no_wrap=True)
            left -= width
    last = None
    for row in sorted(rows[:-1], key=lambda r: (r.steps, _far(r))) + [rows[-1]]:
        style = "bold" if row.steps != last and row is not rows[-1] else "dim" if row is rows[-1] else None
        if last is not None and row.steps != last:
            table.add_section()
        numbers = [_number(row.scores.get(name), form) for name, form in shown]
        table.add_row(str(row.steps), row.solver, *numbers, style=style)
        last = row.steps
    return table


def spectrum_csv(rows: Sequence[Row], data: Measured | None, model: str, shape: tuple[int, ...]) -> str:
    """Power per coefficient over frequency in cycles per pixel, and its ratio to the teacher's; the data at the end."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "solver", "setting", "steps", "frequency", "power", "ratio"])
    frequencies = rings(*shape[1:])[0].tolist()
    teacher = rows[-1].spectrum
    assert teacher is not None
    lines = [(row.solver, row.setting, str(row.steps), row.spectrum) for row in rows]
    lines += [] if data is None else [("data", "", "", _spectrum(data))]
    for solver, setting, steps, power in lines:
        if power is not None:
            for f, p, ratio in zip(frequencies, power.tolist(), (power / teacher).tolist(), strict=True):
                writer.writerow([model, solver, setting, steps, f"{f:.6g}", f"{p:.6g}", f"{ratio:.6g}"])
    return text.getvalue()


def _spectrum(measured: Measured) -> Tensor | None:
    return measured["power"] / measured["count"] if "power" in measured else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """A panel per figure over K, a line per solver, the teacher's level dashed."""
    solvers, teacher = list(dict.fromkeys(row.solver for row in rows[:-1])), rows[-1]
    held = [name for name in METRICS if any(row.scores.get(name) is not None for row in rows[:-1])]
    names = [name for name in PLOTTED if name in held] or held
    columns = max(1, min(3, len(names)))
    lines = max(1, -(-len(names) // columns))
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.1 * columns + 1.8, 3.2 * lines + 0.4), squeeze=False, constrained_layout=True
    )
    colors = plt.get_cmap("tab10" if len(solvers) <= 10 else "tab20")
    sane = _sane(rows[:-1])
    hidden = {*solvers} - {row.solver for row in sane}
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        for index, solver in enumerate(solvers):
            points = [(r.steps, r.scores[name]) for r in rows[:-1] if r.solver == solver and r.scores[name] is not None]
            k, values = zip(*sorted(points), strict=True) if points else ((), ())
            axis.plot(
                k,
                values,
                "o-",
                color=colors(index % colors.N),
                ms=4,
                lw=1.4,
                label=solver + ", off the scale" * (solver in hidden),
            )
        level = teacher.scores.get(name) if name != "fd_teacher" else None
        if level:
            axis.axhline(level, color="0.3", ls="--", lw=1, label="teacher")
        _limits(axis, [level or None, *(r.scores.get(name) for r in sane)], name not in ("recall", "detail"))
        axis.set(xlabel="network evaluations", xticks=sorted({r.steps for r in rows[:-1]}))
        axis.set_title(PLOTTED.get(name, name), fontsize=10)
    _finish(figure, list(axes.flat), title, path)


def _plot_spectrum(path: Path, rows: Sequence[Row], data: Measured | None, model: str, shape: tuple[int, ...]) -> None:
    """Power over frequency, of teacher and data; then, a panel per K, the solvers' relative to the teacher's."""
    frequencies, teacher = rings(*shape[1:])[0], rows[-1].spectrum
    assert teacher is not None
    solvers = list(dict.fromkeys(row.solver for row in rows[:-1]))
    every = sorted({row.steps for row in rows[:-1]})[:5]
    figure, axes = plt.subplots(1, 1 + len(every), figsize=(3.6 * (1 + len(every)) + 1.6, 3.4), constrained_layout=True)
    axes[0].semilogy(frequencies, teacher, "k-", label="teacher")
    own = None if data is None else _spectrum(data)
    if own is not None:
        axes[0].semilogy(frequencies, own, "k:", label="data")
    axes[0].set(title="power per coefficient", xlabel="cycles per pixel")
    axes[0].legend(fontsize=8)
    colors = plt.get_cmap("tab10" if len(solvers) <= 10 else "tab20")
    for axis, k in zip(axes[1:], every, strict=True):
        axis.axhline(1, color="k", lw=1)
        if own is not None:
            axis.plot(frequencies, own / teacher, "k:", label="data")
        for row in rows[:-1]:
            if row.steps == k and row.spectrum is not None:
                color = colors(solvers.index(row.solver) % colors.N)
                axis.plot(frequencies, row.spectrum / teacher, "o-", color=color, ms=3, lw=1.2, label=row.solver)
        here = [r.spectrum for r in _sane(rows[:-1]) if r.steps == k and r.spectrum is not None]
        spectra = here if own is None else [*here, own]
        _limits(axis, [1.0, *(v for power in spectra for v in (power / teacher).tolist())], log=False)
        axis.set(title=f"relative to the teacher's, K = {k}", xlabel="cycles per pixel")
        axis.title.set_fontsize(10)
    _finish(figure, list(axes[1:]), f"{model}: radial power spectrum", path)


def _sane(rows: Sequence[Row]) -> list[Row]:
    """Rows of at most ten times the least L1 at their K: one solver that diverges would hide all others."""
    least: dict[int, float] = {}
    for row in rows:
        least[row.steps] = min(_far(row) or math.inf, least.get(row.steps, math.inf))
    return [row for row in rows if _far(row) <= 10 * least[row.steps]]


def _far(row: Row) -> float:
    """L1, of which nan is the largest; 0 where it was not asked for."""
    l1 = row.scores.get("l1") or 0.0
    return math.inf if math.isnan(l1) else l1


def _limits(axis: Any, values: Iterable[float | None], log: bool) -> None:
    """Of an axis that shows these values; what lies beyond is cut off."""
    known = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    if known:
        low, high = min(known), max(known)
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
        axis.set_ylim(*(((low / 1.15, high * 1.15)) if log else (low - margin, high + margin)))


def _finish(figure: Figure, axes: Sequence[Any], title: str, path: Path) -> None:
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend([*handles.values()], [*handles], fontsize=8, loc="outside right upper")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
