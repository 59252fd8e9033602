"""RESULTS.md, from the CSV files of results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiment import Experiment, Row
from tables import markdown, number, over, plain, read

HEAD = """# Results

Written by `python experiments/run.py` from the files of `experiments/results`; every line of those has the command that
made it. `make experiments` makes them again.

"""


def page(experiments: Sequence[Experiment], results: Path) -> str:
    """The whole page; what has no rows yet is named at its end."""
    parts, missing = [], []
    for experiment in experiments:
        rows = rows_of(experiment, results)
        if rows:
            parts.append(section(experiment, rows, results))
        else:
            missing.append(experiment.title)
    text = HEAD + summary(read(results / "commands.csv"), read(results / "whole.csv")) + "\n".join(parts)
    if missing:
        text += f"\n## Not run yet\n\n{'; '.join(missing)}.\n"
    return text + "\n" + budget(read(results / "commands.csv"))


def rows_of(experiment: Experiment, results: Path) -> list[Row]:
    """Those of its CSV file, or of the one it reads, as far as they are its own."""
    rows = read(results / f"{experiment.source or experiment.name}.csv")
    if experiment.labels:
        rows = [row for row in rows if row["label"] in experiment.labels or row.get("kind") == "teacher"]
    return rows


def section(experiment: Experiment, rows: Sequence[Row], results: Path) -> str:
    """Question, tables, figure, and what is to be seen, by test."""
    text = f"## {experiment.title}\n\n{experiment.question}\n"
    if experiment.over:
        tables = [
            over(rows, metric, experiment.over) for metric in experiment.table if any(r.get(metric) for r in rows)
        ]
        text += "".join(f"\n{table}" for table in tables) + _of_teacher(rows, experiment.table)
    elif experiment.collect == "costs":
        text += "\n" + _costs(rows)
    elif experiment.table:
        text += "\n" + plain(rows, experiment.table)
    if (results / f"{experiment.name}.png").exists():
        text += f"\n![{experiment.title}](results/{experiment.name}.png)\n"
    for claim in experiment.claims:
        verdict = claim.check(rows)
        if verdict is not None:
            holds, figures = verdict
            why = f" {claim.why}" if claim.why and not holds else ""
            text += f"\n- {claim.text} **{'Yes' if holds else 'No'}**: {figures}.{why}"
    said = _lengths(rows)
    return text + (f"\n\n{' '.join(filter(None, [experiment.note, said]))}\n" if experiment.note or said else "\n")


def _of_teacher(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    teacher = next((row for row in rows if row.get("kind") == "teacher"), {})
    said = [f"{number(teacher['fd_data'], 'fd_data')}"] if "fd_data" in metrics and "fd_data" in teacher else []
    return f"\nThe teacher's own FD to the data: {said[0]}.\n" if said else ""


def _lengths(rows: Sequence[Row]) -> str:
    updates = sorted({int(row["updates"]) for row in rows if row.get("updates")})
    samples = sorted({row["samples"] for row in rows if row.get("samples")})
    said = [f"{' or '.join(map(str, updates))} updates"] if updates else []
    said += [f"measured on {' or '.join(samples)} held-out seeds"] if samples else []
    return f"One training run each, {', '.join(said)}." if updates else ""


def _costs(rows: Sequence[Row]) -> str:
    timed, planned = ([row for row in rows if row.get(name)] for name in ("seconds", "paper_gb"))
    text = over(timed, "seconds", "steps") if timed else ""
    if planned:
        names = {"paper_gb": "published code, GB (the paper)", "gib_all_graphs": "all graphs, GiB (predicted)",
                 "gib_one_graph": "one graph (predicted)", "gib_least": "with blocks as well (predicted)"}  # fmt: skip
        lines = [["network, batch, K", *names.values()]]
        for row in planned:
            name = f"{row['model']}, {row['label']}, {row['batch']}, K = {row['steps']}"
            lines.append([name, *(row.get(column, "") for column in names)])
        text += "\n" + markdown(lines)
    return text


def summary(commands: Sequence[Row], whole: Sequence[Row]) -> str:
    """Machine, versions, time; of the last call that ran all commands in one go, how long it took."""
    if not commands:
        return ""
    names = ("device", "torch", "gas_engine")
    several = {name: ", ".join(dict.fromkeys(row[name] for row in commands)) for name in names}
    days = sorted({row["finished"][:10] for row in commands})
    wall, cpu = (sum(float(row[name]) for row in commands) for name in ("seconds", "cpu_seconds"))
    together = "".join(
        f" In one go, two at a time, {row['commands']} commands took {float(row['seconds']) / 60:.0f} minutes "
        f"({row['finished'][:10]})."
        for row in whole
    )
    return (
        f"{len(commands)} commands with a thread each took {wall / 60:.0f} minutes one after the other, "
        f"{cpu / 60:.0f} of CPU time: {several['device']}, torch {several['torch']}, gas_engine "
        f"{several['gas_engine']}, {' to '.join(dict.fromkeys((days[0], days[-1])))}.{together} Seeds are fixed; one "
        "run was made of each solver, so how far another seed falls was not measured.\n\n"
    )


def budget(commands: Sequence[Row]) -> str:
    """Where the time goes."""
    names = list(dict.fromkeys(row["experiment"] for row in commands))
    lines = [["experiment", "commands", "minutes of its commands", "of CPU time"]]
    for name in names:
        mine = [row for row in commands if row["experiment"] == name]
        wall, cpu = (sum(float(row[column]) for row in mine) / 60 for column in ("seconds", "cpu_seconds"))
        lines.append([name, str(len(mine)), f"{wall:.1f}", f"{cpu:.1f}"])
    said = "A command that several experiments share counts for the first."
    return f"## Time\n\n{said}\n\n{markdown(lines)}" if names else ""
