"""README.md and experiments/RESULTS.md say what the committed CSV files say."""

from __future__ import annotations

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
