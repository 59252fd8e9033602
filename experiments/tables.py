"""Rows of results: collected from finished runs, kept as CSV, shown as Markdown."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from experiment import Experiment, Row
from jobs import ROOT, Job
from questions import PAPER_GB

from gas_engine.teacher import load_teacher_set

TITLES = {
    "l1": "L1 to the teacher", "rmse": "RMSE to the teacher", "psnr": "PSNR, dB", "fd_data": "FD to the data",
    "fd_teacher": "FD to the teacher", "detail": "fine detail / the teacher's", "seconds": "seconds of an iteration",
}  # fmt: skip
LESS = ("l1", "rmse", "fd_data", "fd_teacher", "kid_data", "lpips", "seconds")  # the smallest is the best
FORMS = {"l1": ".4f", "rmse": ".4f", "psnr": ".1f", "detail": ".3f", "precision": ".3f", "recall": ".3f"}
AT = re.compile(r", (?:K = \d+|\d+ samples|guidance [\d.]+)$")


def collect(experiment: Experiment, results: Path) -> list[Row]:
    """Rows of what is finished."""
    return COLLECTORS[experiment.collect](experiment, results)


def evaluated(experiment: Experiment, results: Path) -> list[Row]:
    """The rows of its evaluations, each with the training that made the solver."""
    rows = []
    for job in experiment.evaluations:
        if not job.done:
            continue
        for found in read(ROOT / job.out / "evaluation.csv"):
            label, run = _run_of(found["solver"], experiment.learned)
            kind = "learned" if run else "teacher" if found["solver"] == "teacher" else "classical"
            row = {"label": label or found["solver"], "kind": kind} | found
            row |= {"guidance": _word(job, "--guidance")} if "--guidance" in job.words else {}
            rows.append(row | (_training(run) if run else {}) | {"evaluated_by": job.command})
    return [{name: value for name, value in row.items() if value != ""} for row in rows]


def histories(experiment: Experiment, results: Path) -> list[Row]:
    """Times at every reading of every run."""
    rows = []
    for label, job in experiment.learned.items():
        for line in _lines(job, "history.jsonl"):
            times = {f"t{n}": f"{t:.6g}" for n, t in enumerate(line["times"])}
            told = {f"told{n}": f"{t:.6g}" for n, t in enumerate(line["told"])}
            rows.append({"label": label, "step": str(line["step"])} | times | told | {"command": job.command})
    return rows


def spectra(experiment: Experiment, results: Path) -> list[Row]:
    """Power over frequency of its runs, and of the data, relative to the teacher's; of a classical solver, iPNDM's."""
    rows = []
    for job in experiment.evaluations:
        steps = {_word(run, "--steps") for run in experiment.learned.values()}
        for found in read(ROOT / job.out / "spectrum.csv") if job.done else ():
            label = _run_of(found["solver"], experiment.learned)[0]
            if found["solver"] in ("data", "iPNDM") and found.get("steps", "") in ("", *steps):
                label = found["solver"]
            if label:
                shown = {
                    name: found[name] for name in ("model", "steps", "frequency", "power", "ratio") if name in found
                }
                rows.append({"label": label, **shown, "evaluated_by": job.command})
    return rows


def samples(experiment: Experiment, results: Path) -> list[Row]:
    """The pictures, as bytes in an .npz beside the CSV, and their L1 to the teacher's, the first; none of latents."""
    if not all(job.done for job in experiment.others):
        return []
    names = {job.out: _solver_label(job, experiment) for job in experiment.others}
    arrays = {names[job.out]: _samples(job) for job in experiment.others}
    teacher = next(iter(arrays.values()))
    if teacher.ndim != 4 or teacher.shape[1] not in (1, 3):
        return []
    quantised = {n: np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8) for n, x in arrays.items()}
    np.savez_compressed(results / f"{experiment.name}.npz", **quantised)
    return [
        {
            "label": names[job.out],
            "l1": f"{np.abs(arrays[names[job.out]] - teacher).mean():.6g}",
            "command": job.command,
        }
        for job in experiment.others
    ]


def costs(experiment: Experiment, results: Path) -> list[Row]:
    """Seconds of an update of the runs; bytes of an update as planned."""
    rows = []
    for name, job in experiment.learned.items():
        last = [line for line in _lines(job, "metrics.jsonl") if "seconds_per_update" in line][-1:]
        for line in last:
            known = {"label": AT.sub("", name), "model": _word(job, "--model"), "steps": _word(job, "--steps")}
            rows.append(known | {"seconds": str(line["seconds_per_update"])} | _training(job))
    for job in experiment.others:
        if not job.done:
            continue
        plans = [row for row in read(ROOT / job.out / "plan.csv") if row["micro_batch"] == _word(job, "--batch")]
        model, batch, steps = _word(job, "--model"), int(_word(job, "--batch")), int(_word(job, "--steps"))
        gas = "--adversarial" in job.words
        kept = [r for r in plans if (r["blocks"], r["trajectory"], r["graphs"]) == ("none", "keep", str(steps))]
        one = [r for r in plans if r["blocks"] == "none" and r["graphs"] in ("0", "1")]
        sizes = {"gib_all_graphs": kept, "gib_one_graph": one, "gib_least": plans}
        rows.append(
            {"label": "GAS" if gas else "GS", "model": model, "batch": str(batch), "steps": str(steps)}
            | {name: f"{min(int(r['bytes']) for r in some) / 2**30:.3g}" for name, some in sizes.items() if some}
            | {"paper_gb": str(PAPER_GB[model, batch][steps][gas]), "command": job.command}
        )
    return rows


COLLECTORS: dict[str, Callable[[Experiment, Path], list[Row]]] = {
    "evaluated": evaluated, "histories": histories, "spectra": spectra, "samples": samples, "costs": costs,
}  # fmt: skip


def _run_of(solver: str, learned: dict[str, Job]) -> tuple[str, Job | None]:
    """The run that a solver of an evaluation is, by its directory's name or by its path, and its label."""
    for label, job in learned.items():
        if solver in (job.out.name, str(job.out / "solver.safetensors"), str(ROOT / job.out / "solver.safetensors")):
            return AT.sub("", label), job
    return "", None


def _solver_label(job: Job, experiment: Experiment) -> str:
    if job.verb == "teacher":
        return "teacher"
    of = {str(run.out / "solver.safetensors"): label for label, run in experiment.learned.items()}
    solver = _word(job, "--solver")
    return of.get(solver, solver)


def _samples(job: Job) -> np.ndarray:
    """[B, C, H, W] of a command that sampled, or made a teacher's set."""
    if job.verb == "teacher":
        return load_teacher_set(ROOT / job.out)[1].numpy()
    return np.load(ROOT / job.out / "samples.npy")


def _training(job: Job) -> Row:
    """What is known of the run that made a row."""
    facts = job.facts()
    first, _, last = _word(job, "--train-seeds").partition("-")
    said = {"train_samples": str(int(last or first) - int(first) + 1), "updates": _word(job, "--iterations")}
    bits = [line["bits_lost"] for line in _lines(job, "metrics.jsonl") if "bits_lost" in line]
    said |= {"bits": str(bits[-1])} if bits else {}
    said |= {name: str(facts.get(name, "")) for name in ("threads", "device", "gas_engine", "torch", "finished")}
    return (
        said
        | {"run_seconds": str(facts.get("seconds", "")), "cpu_seconds": str(facts.get("cpu_seconds", ""))}
        | {"command": job.command}
    )


def _lines(job: Job, name: str) -> list[dict]:
    path = ROOT / job.out / name
    return [json.loads(line) for line in path.read_text().splitlines()] if job.done and path.exists() else []


def _word(job: Job, option: str) -> str:
    return job.words[job.words.index(option) + 1]


def read(path: Path) -> list[Row]:
    """Lines of a CSV file, without its empty cells; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Rows of one kind or several as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.getvalue())
    temporary.replace(path)


def number(value: str | float, metric: str) -> str:
    """As a table shows it."""
    return format(float(value), FORMS.get(metric, ".3g"))


def rank(value: str) -> tuple[bool, float, str]:
    """Numbers in their order, then words."""
    numeric = value.replace(".", "", 1).isdigit()
    return not numeric, float(value) if numeric else 0.0, value


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head and whose first column is names."""
    head, *body = lines
    ruled = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def over(rows: Sequence[Row], metric: str, column: str) -> str:
    """A line per label, a column per value of ``column``, the smallest of each bold; classical ones sorted below."""
    rows = [row for row in rows if row.get(metric) and row.get(column) and row.get("kind") != "teacher"]
    values = sorted({row[column] for row in rows}, key=rank)
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["label"], {})[row[column]] = row[metric]
    classical = {row["label"] for row in rows if row.get("kind") == "classical"}
    order = [label for label in found if label not in classical]
    order += sorted(classical, key=lambda label: (float(found[label].get(values[0], "inf")), label))
    best = {v: min(float(cells[v]) for cells in found.values() if v in cells) for v in values}
    head = [f"{'K =' if column == 'steps' else column.replace('_', ' ')} {v}" for v in values]
    lines = [[TITLES.get(metric, metric), *head]]
    for label in order:
        cells = [found[label].get(v) for v in values]
        shown = ["" if c is None else number(c, metric) for c in cells]
        bold = [metric in LESS and c is not None and float(c) == best[v] for c, v in zip(cells, values, strict=True)]
        lines.append([label, *(f"**{s}**" if b else s for s, b in zip(shown, bold, strict=True))])
    return markdown(lines)


def plain(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """A line per row, a column per figure that any row has."""
    metrics = [m for m in metrics if any(row.get(m) for row in rows)]
    several = len({row.get("steps") for row in rows if row.get("kind") != "teacher"}) > 1
    lines = [["", *(TITLES.get(m, m) for m in metrics)]]
    for row in rows:
        label = f"{row['label']}, K = {row['steps']}" if several else row["label"]
        lines.append([label, *(number(row[m], m) if row.get(m) else "" for m in metrics)])
    return markdown(lines)
