"""Tables of README.md from the CSV files of results: ``python experiments/readme.py``, or ``--check`` to compare only.

What stands between ``<!-- results:NAME -->`` and ``<!-- /results -->`` is replaced.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiment import Row
from hardware import adversarial, budget, cards, checks, cpu_ops, gpu_iteration, gpu_ops, memory
from jobs import ROOT
from tables import markdown, rank, read

RESULTS = ROOT / "experiments" / "results"
BELM = ROOT / "bench" / "results" / "digits_belm_amd-epyc_2026-11-21.csv"  # reversible runs of the same length
MARKED = re.compile(r"(<!-- results:(\w+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with every marked part written anew; a part whose rows are missing stays. KeyError for no such name."""

    def new(match: re.Match[str]) -> str:
        written = BLOCKS[match[2]](results)
        return match[1] + (written or match[3]) + match[4]

    return MARKED.sub(new, text)


def digits(results: Path) -> str:
    """L1 / RMSE of the quick recipe and of every classical family at each K, and their ratio."""
    rows = [row for row in read(results / "longer.csv") if row["kind"] != "teacher"]
    steps = sorted({int(row["steps"]) for row in rows})
    mine = {int(row["steps"]): row for row in rows if row["label"] == "GS"}
    others = list(dict.fromkeys(row["label"] for row in rows if row["kind"] == "classical"))
    if not mine or not others:
        return ""
    found = {label: {int(row["steps"]): row for row in rows if row["label"] == label} for label in others}
    others.sort(key=lambda label: (float(found[label][steps[0]]["l1"]), label))
    lines = [["L1 / RMSE to the teacher", *(f"K = {k}" for k in steps)]]
    lines.append(["**learned**", *(_pair(mine.get(k)) for k in steps)])
    lines += [[label, *(_pair(found[label].get(k)) for k in steps)] for label in others]
    lines.append(["best classical / learned", *_ratios(rows, steps)])
    lines.append(["the same on 512 other seeds", *_ratios(read(results / "other-seeds.csv"), steps)])
    return markdown(lines)


def _ratios(rows: Sequence[Row], steps: Sequence[int]) -> list[str]:
    """L1 of the best classical solver over that of GS at each K."""
    said = []
    for k in steps:
        here = [row for row in rows if row["steps"] == str(k)]
        mine = [float(row["l1"]) for row in here if row["label"] == "GS"]
        best = [float(row["l1"]) for row in here if row["kind"] == "classical"]
        said.append(f"{min(best) / mine[0]:.2f}x" if mine and best else "")
    return said


def students(results: Path) -> str:
    """L1 of every student at each K, equally many updates each; the nearest is bold."""
    rows = [row for row in read(results / "main.csv") if row["kind"] == "learned"]
    if not rows:
        return ""
    steps = sorted({int(row["steps"]) for row in rows})
    best = {k: min(float(row["l1"]) for row in rows if int(row["steps"]) == k) for k in steps}
    lines = [[f"L1 to the teacher, {rows[0]['updates']} updates", *(f"K = {k}" for k in steps)]]
    for label in dict.fromkeys(row["label"] for row in rows):
        found = {int(row["steps"]): float(row["l1"]) for row in rows if row["label"] == label}
        cells = ["" if k not in found else f"{found[k]:.4f}" for k in steps]
        lines.append(
            [label, *(f"**{c}**" if found.get(k) == best[k] else c for c, k in zip(cells, steps, strict=True))]
        )
    return markdown(lines)


def belm(results: Path) -> str:
    """The Generalized Solver beside a reversible student, and what its residual codes hold."""
    solvers = {row["steps"]: row for row in read(results / "longer.csv") if row["label"] == "GS"}
    reversible = {row["steps"]: row for row in read(BELM) if row["student"] == "belm"}
    steps = [k for k in reversible if k in solvers]
    if not steps:
        return ""
    lines = [["", *(f"K = {k}" for k in steps)]]
    lines += [["Generalized Solver, K+1 states", *(_figure(solvers[k], "l1", ".4f") for k in steps)]]
    lines += [["BELM, two states", *(_figure(reversible[k], "l1", ".4f") for k in steps)]]
    bits = [_figure(reversible[k], "bits_lost", ".1f") for k in steps]
    return markdown([*lines, ["bits that its codes hold, an element and step", *bits]])


def gas(results: Path) -> str:
    """GAS, GS and the best classical solver at K = 4, beside the teacher."""
    rows = [row for row in read(results / "longer.csv") if row["kind"] == "teacher" or row["steps"] == "4"]
    classical = sorted((row for row in rows if row["kind"] == "classical"), key=lambda row: float(row["l1"]))
    shown: list[Row] = [row for row in rows if row["kind"] == "teacher"]
    shown += [row for name in ("GAS", "GS") for row in rows if row["label"] == name]
    if len(shown) < 3 or not classical:
        return ""
    names = ["teacher, 20 evaluations", "GAS", "GS", f"{classical[0]['label']}, the best classical solver"]
    figures = (("l1", ".4f"), ("rmse", ".4f"), ("fd_data", ".3f"), ("fd_teacher", ".3g"))
    lines = [["", "L1", "RMSE", "FD to the data", "FD to the teacher"]]
    for name, row in zip(names, [*shown, classical[0]], strict=True):
        lines.append([name, *(_figure(row, metric, form) for metric, form in figures)])
    return markdown(lines)


def any_steps(results: Path) -> str:
    """One solver for every K beside those trained for each."""
    names = {"one for all K": "one file for all K", "each its own": "a solver trained for each"}
    return _beside(read(results / "any-steps.csv"), names, "steps", "K = ")


def guidance(results: Path) -> str:
    """One solver for a range of guidance beside those trained for each scale, one for all, and the best classical."""
    rows = read(results / "guidance.csv")
    best: dict[str, Row] = {}
    for row in rows:
        here = best.get(row.get("guidance", ""), row)
        if row["kind"] == "classical" and float(row["l1"]) <= float(here["l1"]):
            best[row["guidance"]] = row
    rows += [row | {"label": "classical", "kind": "learned"} for row in best.values()]
    names = {
        "one for all scales": "one file for all scales",
        "each its own": "a solver trained for each",
        "the same at every scale": "one that is the same at every scale",
        "classical": "best classical",
    }
    return _beside(rows, names, "guidance", "g = ", fd=True)


def photos(results: Path) -> str:
    """Distance and fine detail of solvers on the photographs; and of solvers at another resolution than their own."""
    rows = [row for row in read(results / "photos.csv") if row["kind"] != "teacher"]
    here = [row for row in rows if row["kind"] == "classical" or row["label"] == "GS of photos"]
    if not here:
        return ""
    here.sort(key=lambda row: float(row["l1"]))
    lines = [["photographs, K = 4", "L1 to the teacher", "detail / the teacher's", "FD to the teacher"]]
    figures = (("l1", ".4f"), ("detail", ".2f"), ("fd_teacher", ".0f"))
    for row in here:
        name = "**learned**" if row["kind"] == "learned" else row["label"]
        lines.append([name, *(_figure(row, metric, form) for metric, form in figures)])
    return markdown(lines)


def resolutions(results: Path) -> str:
    """L1 of solvers learned at one resolution and used at another."""
    rows = read(results / "transfer.csv")
    places = {"photos": "at 32 pixels", "photos at 40 px": "at 40 pixels"}
    labels = {"GS of photos": "learned at 32 pixels", "GS of photos at 40 px": "learned at 40 pixels"}
    found = {(row["label"], row["model"]): float(row["l1"]) for row in rows}
    best = {
        p: min((float(r["l1"]) for r in rows if r["kind"] == "classical" and r["model"] == p), default=0.0)
        for p in places
    }
    if not all(best.values()) or not all((label, place) in found for label in labels for place in places):
        return ""
    lines = [["L1 to the teacher", *places.values()]]
    lines += [[said, *(f"{found[label, place]:.4f}" for place in places)] for label, said in labels.items()]
    return markdown([*lines, ["best classical", *(f"{best[place]:.4f}" for place in places)]])


def _beside(rows: Sequence[Row], names: dict[str, str], column: str, head: str, fd: bool = False) -> str:
    """L1 of labels, called by ``names``, over a column, and the ratio of the first to the second; ``fd``: in FD to the
    teacher as well."""
    found, apart = (
        {(row["label"], row[column]): float(row[metric]) for row in rows if row["kind"] == "learned" and metric in row}
        for metric in ("l1", "fd_teacher")
    )
    places = sorted({v for _, v in found if all((label, v) in found for label in names)}, key=rank)
    if not places:
        return ""
    lines = [["L1 to the teacher", *(f"{head}{v}" for v in places)]]
    lines += [[name, *(f"{found[label, v]:.4f}" for v in places)] for label, name in names.items()]
    first, second = [*names][:2]
    lines.append(["ratio of the first two", *(f"{found[first, v] / found[second, v]:.2f}" for v in places)])
    if fd and all((label, v) in apart for label in (first, second) for v in places):
        lines.append(["in FD to the teacher", *(f"{apart[first, v] / apart[second, v]:.2f}" for v in places)])
    return markdown(lines)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "digits": digits,
    "students": students,
    "belm": belm,
    "gas": gas,
    "any": any_steps,
    "guidance": guidance,
    "photos": photos,
    "resolutions": resolutions,
    "adversarial": adversarial,
    "budget": budget,
    "memory": memory,
    "ops": cpu_ops,
    "gpu": gpu_ops,
    "gpu_iteration": gpu_iteration,
    "checks": checks,
    "cards": cards,
}


def _pair(row: Row | None) -> str:
    return "" if row is None else f"{float(row['l1']):.4f} / {float(row['rmse']):.4f}"


def _figure(row: Row | None, metric: str, form: str) -> str:
    return "" if row is None or metric not in row else format(float(row[metric]), form)


def main(words: Sequence[str]) -> int:
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if "--check" in words:
        if new != old:
            print("README.md differs from experiments/results: run python experiments/readme.py", file=sys.stderr)
        return int(new != old)
    if new != old:
        path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
