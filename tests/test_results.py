"""README.md and experiments/RESULTS.md say what the committed CSV files say."""

from __future__ import annotations

import re

import claims
import hardware
import pytest
import readme
import tables
from experiment import Setting
from jobs import ROOT, in_order
from page import page, rows_of
from questions import questions

RESULTS = ROOT / "experiments" / "results"
EVERY = questions(Setting())


def test_readme():
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text) == text, "run python experiments/readme.py"


def test_every_table_has_rows():
    text = (ROOT / "README.md").read_text()
    parts = {name: part.strip() for _, name, part, _ in readme.MARKED.findall(text)}
    assert parts.keys() == readme.BLOCKS.keys() and not [name for name, part in parts.items() if not part]


@pytest.mark.parametrize(
    ("path", "lines"), [(hardware.CPU_OPS, hardware.ON_CPU), (hardware.GPU_OPS, hardware.ON_GPU)], ids=["cpu", "gpu"]
)
def test_every_line_of_the_ops_was_measured(path, lines):
    assert [name for name, _ in hardware._pairs(path, lines)] == [name for _, name, *_ in lines]


def test_results_page():
    assert (ROOT / "experiments" / "RESULTS.md").read_text() == page(EVERY, RESULTS), (
        "run python experiments/run.py --render"
    )


@pytest.mark.parametrize("experiment", EVERY, ids=lambda e: e.name)
def test_rows_have_the_commands_of_today_and_a_figure(experiment):
    rows = rows_of(experiment, RESULTS)
    if not rows:
        pytest.skip(f"not run yet: python experiments/run.py --only {experiment.name}")
    jobs = in_order(job for e in EVERY if e.name in (experiment.name, experiment.source) for job in e.jobs)
    known = {job.command for job in jobs}
    assert {row["command"] for row in rows if "command" in row} <= known
    assert {row["evaluated_by"] for row in rows if "evaluated_by" in row} <= known
    picture = RESULTS / f"{experiment.name}.png"
    assert picture.stat().st_size < 300_000


def test_every_command_and_its_time_is_kept():
    commands = {row["command"]: row for row in tables.read(RESULTS / "commands.csv")}
    for experiment in EVERY:
        if not experiment.source and rows_of(experiment, RESULTS):
            for job in in_order(experiment.jobs):
                assert float(commands[job.command]["seconds"]) > 0


def test_what_must_hold_is_in_the_rows():
    """GS beside classical solvers, S4S's form and the paper's rivals; one solver for every K, and for every scale."""
    main, forms = rows_of(EVERY[0], RESULTS), ("GS in S4S's form", "GS in the linear form", "LD3", "S4S", "S4S-Alt")
    longer, others = (tables.read(RESULTS / f"{name}.csv") for name in ("longer", "other-seeds"))
    for rows in (main, longer, others):
        assert claims.below("GS", kind="classical")(rows)[0] and {row["steps"] for row in rows} >= {"4", "6", "8", "10"}
    assert claims.below("GS", forms)(main)[0]
    every = tables.read(RESULTS / "any-steps.csv")
    assert claims.within(0.1, "one for all K", "each its own")(every)[0]
    assert {row["steps"] for row in every if row["label"] == "each its own"} == {*map(str, range(4, 11))}
    guided = tables.read(RESULTS / "guidance.csv")
    assert claims.within(0.1, "one for all scales", "each its own", over="guidance")(guided)[0]


def test_all_commands_ran_in_one_go_within_an_hour():
    (whole,) = tables.read(RESULTS / "whole.csv")
    assert int(whole["commands"]) == len(in_order(job for e in EVERY for job in e.jobs))
    assert float(whole["seconds"]) < 3600


def best(rows, metric="l1"):
    """The classical solver with the least."""
    return min((row for row in rows if row["kind"] == "classical"), key=lambda row: float(row[metric]))


def test_sentences_of_readme_and_results():
    """What stands in words beside generated tables: of rivals, FD to the data, GAS, photographs, bases."""
    longer, transfer = (tables.read(RESULTS / f"{name}.csv") for name in ("longer", "transfer"))
    at = {k: [row for row in longer if row["steps"] == k] for k in ("4", "6", "8", "10")}
    mine = {k: next(row for row in rows if row["label"] == "GS") for k, rows in at.items()}
    assert claims.below("GS", ("BNS",))(at["10"])[0]
    teacher = next(float(row["fd_data"]) for row in longer if row["kind"] == "teacher")
    nearest = {k: float(best(rows, "fd_data")["fd_data"]) for k, rows in at.items()}
    assert all(nearest[k] < float(mine[k]["fd_data"]) for k in ("6", "8", "10"))
    assert min(nearest.values()) < teacher
    gas = next(row for row in at["4"] if row["label"] == "GAS")
    assert teacher < float(gas["fd_data"]) < float(mine["4"]["fd_data"]) and float(gas["l1"]) > float(mine["4"]["l1"])
    assert best(at["4"])["label"] == best([row for row in rows_of(EVERY[0], RESULTS) if row["steps"] == "4"])["label"]
    assert best(at["4"])["label"] == "iPNDM" and best(tables.read(RESULTS / "photos.csv"))["label"] == "UniPC"
    assert claims.outside(("GS of photos", "photos at 40 px"))(transfer)[0]
    assert not claims.outside(("GS of photos at 40 px", "photos"))(transfer)[0]
    rows = [row for row in tables.read(RESULTS / "base.csv") if row["kind"] == "learned"]
    bases = [float(row["l1"]) for row in rows]
    assert 1 / 7 < 1 - min(bases) / max(bases) < 1 / 5
    assert min(rows, key=lambda row: float(row["fd_teacher"]))["label"] == "dpmpp3m"


def test_every_picture_of_readme_has_a_command():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    made = {row["picture"] for row in tables.read(ROOT / "bench" / "results" / "pictures.csv")}
    made |= {f"experiments/results/{experiment.name}.png" for experiment in EVERY}
    assert shown and {*shown} <= made
