"""Figures of experiments, from their CSV files (and the .npz of pictures) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from experiment import Experiment, Row
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from tables import TITLES, rank

from gas_engine.files import atomic
from gas_engine.pictures import image_rows, plt


def draw(experiment: Experiment, rows: Sequence[Row], path: Path) -> bool:
    """Draw the figure of an experiment; False where there is nothing to draw."""
    return bool(rows) and FIGURES[experiment.figure](experiment, rows, path)


def figures(experiment: Experiment, rows: Sequence[Row], path: Path) -> bool:
    """A panel for each of up to three figures: lines over K or another column, else bars; dashed: the teacher."""
    metrics = [m for m in experiment.table if any(row.get(m) for row in rows)][:3]
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.2 * len(metrics) + 2.3, 4), squeeze=False, layout="constrained"
    )
    column = experiment.over
    for axis, metric in zip(axes[0], metrics, strict=True):
        _lines(axis, rows, metric, column) if column else _bars(axis, rows, metric)
        axis.set_title(TITLES.get(metric, metric), fontsize=10)
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if column and handles:
        figure.legend([*handles.values()], [*handles], fontsize=8, loc="outside right upper")
    return _save(figure, path)


def _lines(axis: Axes, rows: Sequence[Row], metric: str, column: str) -> None:
    labels = list(dict.fromkeys(row["label"] for row in rows if row["kind"] != "teacher"))
    learned = {row["label"] for row in rows if row["kind"] == "learned"}
    colors = plt.get_cmap("tab10")
    places = sorted({row[column] for row in rows if row.get(column) and row["kind"] != "teacher"}, key=rank)
    worst = max((float(r[metric]) for r in rows if r["label"] in learned and r.get(metric)), default=1.0)
    worst = 10 * worst  # what is above it is off every scale, as Heun is at few evaluations
    for index, label in enumerate(labels):
        points = [(places.index(r[column]), float(r[metric])) for r in rows if r["label"] == label and r.get(metric)]
        if not points or (label not in learned and max(y for _, y in points) > worst):
            continue
        classical = label not in learned
        x, y = zip(*sorted(points), strict=True)
        axis.plot(
            x, y, marker="os^Dv"[index // 10 % 5], ls=":" if classical else "-", ms=4, lw=1.4,
            color=str(0.25 + 0.09 * (index % 7)) if classical else colors(index % 10), label=label,
        )  # fmt: skip
    level = next((float(r[metric]) for r in rows if r["kind"] == "teacher" and r.get(metric)), 0.0)
    if level > 0:
        axis.axhline(level, color="k", ls="--", lw=1, label="teacher")
    bottom, top = (limit(y for line in axis.lines for y in line.get_ydata()) for limit in (min, max))
    if top > 4 * bottom:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 200 * bottom else (1,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(lambda *_: "")
    else:
        axis.set_ylim(0, 1.08 * top)
    axis.set_xticks(range(len(places)), places)
    axis.set_xlabel("network evaluations K" if column == "steps" else column.replace("_", " "))


def _bars(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    shown = [row for row in rows if row.get(metric)]
    values = [float(row[metric]) for row in shown]
    names = [row["label"] for row in shown]
    colors = {"learned": "C0", "classical": "0.6", "teacher": "0.3"}
    axis.barh(range(len(shown)), values, color=[colors[row.get("kind", "learned")] for row in shown])
    for n, value in enumerate(values):
        axis.annotate(f"{value:.3g}", (value, n), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(range(len(shown)), names, fontsize=8)
    axis.set_xlim(0, 1.18 * sorted(values)[-2 if len(values) > 8 else -1])
    axis.locator_params(axis="x", nbins=5)
    axis.invert_yaxis()


def histories(experiment: Experiment, rows: Sequence[Row], path: Path) -> bool:
    """A panel per student: its times over the updates."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    columns = min(4, len(labels))
    lines = -(-len(labels) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(3.1 * columns, 2.7 * lines),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(labels) :]:
        axis.axis("off")
    for axis, label in zip(axes.flat, labels, strict=False):
        mine = [row for row in rows if row["label"] == label]
        steps = [int(row["step"]) for row in mine]
        states = [name for name in mine[0] if name[0] == "t" and name[1:].isdigit()]
        for n, name in enumerate(states):
            color = plt.get_cmap("viridis")(0.9 * n / (len(states) - 1))
            axis.plot(steps, [float(row[name]) for row in mine], color=color)
            if f"told{n}" in mine[0]:
                axis.plot(steps, [float(row[f"told{n}"]) for row in mine], "--", color=color, lw=1)
        axis.set_title(label, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("update")
    for line in axes:
        line[0].set_ylabel("time t")
    return _save(figure, path)


def spectra(experiment: Experiment, rows: Sequence[Row], path: Path) -> bool:
    """Power relative to the teacher's over frequency; the data dotted."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axis.axhline(1, color="k", ls="--", lw=1, label="teacher")
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        style = {"color": "k", "ls": ":"} if label == "data" else {"marker": "o", "ms": 3, "lw": 1.4}
        axis.plot([float(r["frequency"]) for r in mine], [float(r["ratio"]) for r in mine], label=label, **style)
    axis.set(xlabel="cycles per pixel", ylabel="power / the teacher's")
    figure.legend(fontsize=8, loc="outside right upper")
    return _save(figure, path)


def samples(experiment: Experiment, rows: Sequence[Row], path: Path) -> bool:
    """Rows of pictures, and the errors of all but the first beneath."""
    with np.load(path.with_suffix(".npz")) as file:
        found = {name: torch.from_numpy(file[name]).float() / 127.5 - 1 for name in (row["label"] for row in rows)}
    teacher, *others = found
    drawn = [*found.items(), *((f"|{name} - teacher|", found[name] - found[teacher]) for name in others)]
    image_rows(path, drawn, experiment.title)
    return True


def costs(experiment: Experiment, rows: Sequence[Row], path: Path) -> bool:
    """Seconds of an update over K, and what is predicted beside the paper's gigabytes."""
    timed = [row for row in rows if row.get("seconds")]
    planned = [row for row in rows if row.get("paper_gb")]
    figure, axes = plt.subplots(
        1, 1 + bool(planned), figsize=(5 + 6 * bool(planned), 3.8), squeeze=False, layout="constrained"
    )
    for label in dict.fromkeys(row["label"] for row in timed):
        points = sorted((int(row["steps"]), float(row["seconds"])) for row in timed if row["label"] == label)
        axes[0, 0].plot(*zip(*points, strict=True), "o-", label=label)
    axes[0, 0].set(xlabel="network evaluations K", ylabel="seconds of an update", ylim=(0, None), title="measured here")
    axes[0, 0].legend(fontsize=8)
    bars = {"paper_gb": ("published, GB (paper)", "0.6"), "gib_all_graphs": ("all graphs, GiB (predicted)", "C0")}
    bars |= {"gib_one_graph": ("one graph, GiB (predicted)", "C1"), "gib_least": ("least, GiB (predicted)", "C2")}
    for n, (name, (label, color)) in enumerate(bars.items() if planned else ()):
        height = [float(row.get(name, "nan")) for row in planned]
        axes[0, 1].bar(np.arange(len(planned)) + 0.2 * (n - 1.5), height, 0.2, label=label, color=color)
    if planned:
        names = [f"{row['model']}\n{row['label']}\nK = {row['steps']}" for row in planned]
        axes[0, 1].set_xticks(range(len(planned)), names, fontsize=7)
        axes[0, 1].set(yscale="log", title="memory of an iteration")
        axes[0, 1].yaxis.set_major_formatter("{x:g}")
        axes[0, 1].legend(fontsize=7)
    return _save(figure, path)


FIGURES: dict[str, Callable[[Experiment, Sequence[Row], Path], bool]] = {
    "figures": figures, "histories": histories, "spectra": spectra, "samples": samples, "costs": costs,
}  # fmt: skip


def _save(figure: plt.Figure, path: Path) -> bool:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)
    return True
