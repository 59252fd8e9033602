"""Run the experiments: ``python experiments/run.py``, or ``make experiments``.

Every command runs once: what is finished is not repeated, and what was stopped goes on. Rows go to
``experiments/results/*.csv`` as experiments end; at the end of all, or by ``--render``, figures go beside them and both
to ``experiments/RESULTS.md``.

    python experiments/run.py --list                       # the experiments, and the commands of each
    python experiments/run.py --only main gan-kinds        # some of them
    python experiments/run.py --render                     # figures and RESULTS.md again, from the CSV files
    python experiments/run.py --model PATH --guidance 7.5 --memory-budget 8GiB   # the same of another model

Other options go to the commands that have them: --recipe, --config, --loss and the like to train, --teacher.steps to
all.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import figures
import readme
import tables
from experiment import Experiment, Row, Setting
from jobs import ROOT, Failed, Job, in_order, machine, now, run_all
from page import page, rows_of
from questions import questions

from gas_engine._cli import console, progress
from gas_engine.files import write_text


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, Setting, Path]:
    """Options, the setting that they make, and where results go: of models that are not embedded, to their runs."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how, allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="print the experiments and their commands")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these experiments")
    parser.add_argument("--render", action="store_true", help="only write figures and pages again")
    parser.add_argument("--smoke", action="store_true", help="two updates, few seeds: only that everything runs")
    parser.add_argument("--model", default="digits", help="as train takes it")
    parser.add_argument("--transfer", metavar="MODEL", default="", help="a second model: solvers of both, on both")
    parser.add_argument("--updates", type=int, help="of most runs (250)")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="commands at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each command")
    parser.add_argument("--runs", type=Path, default=Path("experiments/runs"), help="where runs lie")
    parser.add_argument("--results", type=Path, help="where CSV files and figures go")
    options, passed = parser.parse_known_args(words)
    setting = Setting(options.model, tuple(passed), options.transfer, options.runs)
    if options.updates:
        setting = dataclasses.replace(setting, updates=options.updates)
    if options.smoke:
        setting = dataclasses.replace(setting, runs=options.runs / "smoke").smoke()
    own = setting == Setting(runs=options.runs)
    results = options.results or (Path("experiments/results") if own else setting.place / "results")
    return options, setting, ROOT / results


def main(words: Sequence[str] | None = None) -> int:
    options, setting, results = parse(sys.argv[1:] if words is None else words)
    try:
        every = questions(setting)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    unknown = {*(options.only or ())} - {e.name for e in every}
    if unknown:
        print(f"no experiment {min(unknown)!r}; known: {', '.join(e.name for e in every)}", file=sys.stderr)
        return 2
    chosen = [e for e in every if not options.only or e.name in options.only]
    if options.list:
        _list(chosen)
        return 0
    failures = []
    if not options.render:
        results.mkdir(parents=True, exist_ok=True)
        failures = _run(chosen, every, results, options.processes, options.threads)
    render(every, results)
    for failure in failures:
        console.print(f"failed    {failure}", style="red", soft_wrap=True, markup=False)
    return 1 if failures else 0


def _run(
    chosen: Sequence[Experiment], every: Sequence[Experiment], results: Path, processes: int, threads: int
) -> list[Failed]:
    """Run what the chosen experiments lack; collect each one's rows when its last command ends."""
    for experiment in chosen:
        if experiment.lacks:
            console.print(f"left out  {experiment.name}: {experiment.lacks}", soft_wrap=True)
    chosen = [experiment for experiment in chosen if not experiment.lacks]
    jobs = in_order(job for experiment in chosen for job in experiment.jobs)
    todo, begun = [job for job in jobs if not job.done], time.monotonic()
    console.print(f"{len(jobs)} commands, {len(jobs) - len(todo)} of them done", soft_wrap=True)
    with progress() as bar:
        task = bar.add_task("experiments", total=len(jobs), completed=len(jobs) - len(todo), note="")

        def said(job: Job, seconds: float | Failed) -> None:
            bar.update(task, advance=1, note=job.out.name)
            if isinstance(seconds, Failed):
                bar.console.print(f"failed    {seconds}", soft_wrap=True, markup=False)
            else:
                bar.console.print(f"{seconds:7.1f} s  {job.out}", soft_wrap=True, highlight=False)
            for experiment in chosen:
                if job in experiment.jobs and all(other.done for other in experiment.jobs):
                    _collect(experiment, every, results)

        failures = run_all(todo, processes, threads, said)
    if not failures and len(todo) == len(in_order(job for experiment in every for job in experiment.jobs)):
        took = {"commands": str(len(todo)), "seconds": f"{time.monotonic() - begun:.0f}", "processes": str(processes)}
        row = {"command": "python experiments/run.py", **took, **machine(), "finished": now()}
        tables.write(results / "whole.csv", [row])
    for experiment in chosen:
        _collect(experiment, every, results)
    return failures


def _collect(experiment: Experiment, every: Sequence[Experiment], results: Path) -> None:
    """Write its rows, and what all commands took; rows that cannot be made again stay."""
    rows = [] if experiment.source else tables.collect(experiment, results)
    if rows:
        tables.write(results / f"{experiment.name}.csv", rows)
    commands: dict[str, Row] = {row["command"]: row for row in tables.read(results / "commands.csv")}
    for other in every:
        for job in in_order(other.jobs):
            facts = job.facts()
            if facts.get("finished"):
                first = commands.get(job.command, {}).get("experiment", other.name)
                commands[job.command] = {"experiment": first, **{name: str(value) for name, value in facts.items()}}
    known = {job.command for other in every for job in in_order(other.jobs)}
    if commands:
        tables.write(results / "commands.csv", [row for row in commands.values() if row["command"] in known])


def render(every: Sequence[Experiment], results: Path) -> None:
    """Figures, RESULTS.md beside the directory of results, and, of the embedded model, the tables of README.md."""
    for experiment in every:
        figures.draw(experiment, rows_of(experiment, results), results / f"{experiment.name}.png")
    write_text(results.parent / "RESULTS.md", page(every, results))
    if results == ROOT / "experiments" / "results":
        readme.main(())


def _list(experiments: Sequence[Experiment]) -> None:
    seen: set[Job] = set()
    for experiment in experiments:
        jobs = [job for job in in_order(experiment.jobs) if job not in seen]
        seen |= {*jobs}
        print(f"{experiment.name}: {experiment.title}\n  {experiment.question}")
        print("".join(f"    {job.command}{'  # done' if job.done else ''}\n" for job in jobs), end="")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that commands that run are stopped
    raise SystemExit(main())
