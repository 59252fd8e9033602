"""experiments/: commands that parse, run once and go on; rows that become tables and verdicts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import claims
import jobs
import pytest
import readme
import run
import tables
import tyro
from experiment import Experiment, Setting, evaluate, train
from jobs import Failed, Job
from questions import questions

from gas_engine.train import _resuming
from gas_engine.training.presets import with_preset

EVERY = {experiment.name: experiment for experiment in questions(Setting())}


def row(label, k, l1, kind="learned", **more):
    return {"label": label, "steps": str(k), "l1": str(l1), "kind": kind, **more}


@pytest.mark.parametrize("name", EVERY)
def test_commands_parse(name, monkeypatch):
    """Every command line is one that the verb takes, also with options passed through."""
    passed = ("--guidance", "7.5", "--memory-budget", "8GiB", "--loss", "l2", "--teacher.steps", "12", "--no-pictures")
    for setting in (Setting(), Setting("some/model", passed, other="another/model")):
        experiment = next((e for e in questions(setting) if e.name == name), None)
        for job in jobs.in_order(experiment.jobs) if experiment else ():
            words = [*job.words, "--out", str(job.out)]
            if job.verb == "train":
                words = _resuming(with_preset([*words, "--resume", "auto"]))
            try:
                tyro.cli(importlib.import_module(f"gas_engine.{job.verb}").Config, args=words)
            except SystemExit:
                pytest.fail(job.command)


def test_pictures_are_beside_the_teacher_of_the_runs():
    """With its own steps and end of time; of latents there are none."""
    passed = ("--teacher.steps", "12", "--teacher.t-eps", "0.01")
    pictures = next(e for e in questions(Setting("some/model", passed)) if e.name == "pictures")
    first, *others = pictures.others
    assert first.verb == "teacher" and " ".join(first.words).count("--steps 12 --t-eps 0.01") == 1
    assert all(job.verb == "sample" and "12" not in job.words for job in others)


def test_names_are_different():
    every = [job for experiment in EVERY.values() for job in experiment.jobs]
    assert len({job.out for job in jobs.in_order(every)}) == len(jobs.in_order(every))
    assert all(experiment.source in ("", *EVERY) for experiment in EVERY.values())
    with pytest.raises(ValueError, match="two commands write to"):
        jobs.in_order([Job("train", ("--a",), Path("x")), Job("train", ("--b",), Path("x"))])


def test_jobs_run_after_what_they_need_and_not_after_its_failure(monkeypatch):
    first = Job("teacher", (), Path("a"))
    bad = Job("train", ("bad",), Path("b"), (first,))
    good = Job("train", (), Path("c"), (first,))
    last, lost = Job("evaluate", (), Path("d"), (good,)), Job("evaluate", (), Path("e"), (good, bad))
    ran, told = [], {}

    def one(job, threads):
        ran.append(job)
        if job is bad:
            raise Failed("exit code 2")
        return 1.0

    monkeypatch.setattr(jobs, "run", one)
    failures = jobs.run_all([lost, last], 2, 1, lambda job, seconds: told.update({job: seconds}))
    assert ran[0] is first and {*ran} == {first, bad, good, last} and ran.index(good) < ran.index(last)
    assert [str(failure) for failure in failures] == ["exit code 2"]
    assert told[last] == 1.0 and isinstance(told[lost], Failed)


def one(setting):
    """A list of experiments of one training."""
    made = train(setting, "gs-k4", "--steps", "4")
    measured = evaluate(setting, "evaluation", [made])
    return [
        Experiment("one", "One", "Does it run?", {"GS, K = 4": made}, (measured,), table=("l1", "fd_data")),
        Experiment("never", "Never run", "", {"GS, K = 4": train(setting, "never", "--steps", "4")}),
    ]


def test_a_smoke_run_ends_in_a_page_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "questions", one)
    words = ["--smoke", "--only", "one", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert run.main(words) == 0
    rows = tables.read(tmp_path / "results" / "one.csv")
    assert [(r["label"], r["kind"], r["steps"]) for r in rows] == [("GS", "learned", "4"), ("teacher", "teacher", "20")]
    assert rows[0]["command"].startswith("gas-engine train --model digits --recipe quick --steps 4 --iterations 2 ")
    assert rows[0]["updates"] == "2" and float(rows[0]["l1"]) > 0 and float(rows[0]["run_seconds"]) > 0
    assert [row["command"].split()[1] for row in tables.read(tmp_path / "results" / "commands.csv")] == [
        "teacher", "train", "evaluate",
    ]  # fmt: skip
    assert not (tmp_path / "results" / "whole.csv").exists()  # there is another experiment
    page = (tmp_path / "RESULTS.md").read_text()
    assert "## One\n" in page and "results/one.png" in page and "## Not run yet\n\nNever run." in page
    assert (tmp_path / "results" / "one.png").stat().st_size > 5_000

    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("a finished command was run again"))
    capsys.readouterr()
    assert run.main(words) == 0
    assert "3 commands, 3 of them done" in capsys.readouterr().out
    assert tables.read(tmp_path / "results" / "one.csv") == rows
    assert run.main([*words, "--render"]) == 0 and (tmp_path / "RESULTS.md").read_text() == page


def test_a_command_that_fails_is_said_and_what_another_left_is_removed(tmp_path):
    job = Job("nothing", ("--steps", "4"), tmp_path / "run")
    (tmp_path / "run").mkdir()
    jobs._write(job.stamp, {"command": "gas-engine nothing --steps 6", "finished": "now"})
    with pytest.raises(
        Failed, match=r"gas-engine nothing --steps 4 .*: exit code 1: .*No module named 'gas_engine\.nothing'"
    ):
        jobs.run(job)
    assert not job.done and job.facts()["seconds"] >= 0 and not (tmp_path / "run").exists()


def test_stopped_it_leaves_no_command_running(tmp_path):
    words = ["--only", "main", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    called = [sys.executable, run.__file__, *words]
    with subprocess.Popen(called, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while not [*tmp_path.glob("runs/digits/teacher.json")]:
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
    assert process.returncode == 143
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)  # whether any of its session is left
            time.sleep(0.1)


def test_another_command_is_another_job(tmp_path):
    job = Job("doctor", (), tmp_path / "a")
    jobs._write(job.stamp, {"command": job.command, "finished": "now"})
    assert job.done and not Job("doctor", ("--more",), tmp_path / "a").done


def test_options_go_to_the_commands_that_have_them(capsys):
    passed = Setting(model="m", options=("--guidance", "2:9", "--teacher.steps", "12", "--recipe", "paper"))
    assert passed.of_model("teacher") == ("--model", "m", "--guidance", "2:9", "--steps", "12")
    assert passed.of_model("evaluate") == ("--model", "m", "--guidance", "2:9", "--teacher.steps", "12")
    words = train(passed, "x").words
    assert words[:8] == ("--model", "m", "--guidance", "2:9", "--teacher.steps", "12", "--recipe", "paper")
    assert words.count("--recipe") == 1
    for wrong, said in (("--nonsense", "no command has an option --nonsense"), ("stray", "'stray' is no option")):
        assert run.main(["--list", wrong]) == 2
        assert said in capsys.readouterr().err


def test_unknown_names_are_refused(capsys):
    assert run.main(["--only", "nothing"]) == 2
    assert "no experiment 'nothing'; known: main" in capsys.readouterr().err


def test_below_names_the_nearest_rival_at_every_k():
    rows = [row("GS", 4, 0.1), row("A", 4, 0.3), row("B", 4, 0.2), row("GS", 6, 0.05), row("A", 6, 0.01)]
    assert claims.below("GS", ("A", "B"))(rows) == (False, "K = 4: 0.1 against 0.2 (B); K = 6: 0.05 against 0.01 (A)")
    assert claims.below("GS", ("B",))(rows) == (True, "K = 4: 0.1 against 0.2 (B)")
    assert claims.below("GS", ("C",))(rows) is None
    classical = [row("GS", 4, 0.1), row("UniPC", 4, 0.2, kind="classical")]
    assert claims.below("GS", kind="classical")(classical) == (True, "K = 4: 0.1 against 0.2 (UniPC)")


def test_outside_asks_for_solvers_away_from_home():
    def at(model, *found):
        return [row(label, 4, l1, kind=kind, model=model) for label, l1, kind in found]

    rows = at("a", ("of a", 0.1, "learned"), ("of b", 0.2, "learned"), ("iPNDM", 0.3, "classical"))
    rows += at("b", ("of b", 0.1, "learned"), ("of a", 0.5, "learned"), ("iPNDM", 0.4, "classical"))
    said = "model a: 0.2 against 0.3 (iPNDM)"
    assert claims.outside(("of b", "a"))(rows) == (True, said)
    assert claims.outside(("of b", "a"), ("of a", "b"))(rows) == (False, said + "; model b: 0.5 against 0.4 (iPNDM)")
    assert claims.outside(("of c", "a"))(rows) is None


def test_within_is_a_bound_on_the_largest_ratio():
    rows = [row("any", 4, 0.11), row("own", 4, 0.1), row("any", 10, 0.012), row("own", 10, 0.01), row("any", 5, 1)]
    assert claims.within(0.25, "any", "own")(rows) == (True, "ratio 1.10 (K = 4), 1.20 (K = 10)")
    assert claims.within(0.15, "any", "own")(rows)[0] is False


def test_moves_less_compares_the_fewest_with_the_most():
    rows = [row("GS", 4, l1, train_samples=n) for n, l1 in (("88", 0.103), ("1400", 0.1), ("350", 9))]
    rows += [row("GAS", 4, l1, train_samples=n) for n, l1 in (("88", 0.12), ("1400", 0.1))]
    holds, said = claims.moves_less("GS", "GAS", 0.01)(rows)
    assert holds and said.endswith("GS +3.0%, GAS +20.0%")
    assert claims.moves_less("GAS", "GS", 0.01)(rows)[0] is False
    assert claims.moves_less("GS", "nobody", 0.01)(rows) is None


def test_a_table_over_k():
    rows = [
        row("GS", 10, 0.001),
        row("GS", 4, 0.01),
        row("Z", 4, 0.5, kind="classical"),
        row("teacher", 20, 0, "teacher"),
    ]
    rows += [row("A", 4, 0.2, kind="classical"), row("A", 10, 0.0002, kind="classical")]
    assert tables.over(rows, "l1", "steps").splitlines() == [
        "| L1 to the teacher | K = 4 | K = 10 |", "| --- | ---: | ---: |", "| GS | **0.0100** | 0.0010 |",
        "| A | 0.2000 | **0.0002** |", "| Z | 0.5000 |  |",
    ]  # fmt: skip


def test_scales_of_guidance_stand_in_their_order(tmp_path):
    found = []
    for scale, l1 in (("10", 0.2), ("1.5", 0.1), ("2", 0.12)):
        labels = {"one for all scales": 1.05, "each its own": 1.0, "the same at every scale": 3.0}
        found += [row(label, 6, round(l1 * share, 6), guidance=scale) for label, share in labels.items()]
        found += [row(name, 6, l1 * share, "classical", guidance=scale) for name, share in (("A", 9), ("B", 8))]
    found.append(row("teacher", 20, 0, "teacher", guidance="2"))
    assert tables.over(found, "l1", "guidance").startswith(
        "| L1 to the teacher | guidance 1.5 | guidance 2 | guidance 10 |"
    )
    holds, said = claims.within(0.1, "one for all scales", "each its own", over="guidance")(found)
    assert holds and said == "ratio 1.05 (guidance 1.5), 1.05 (guidance 2), 1.05 (guidance 10)"
    tables.write(tmp_path / "guidance.csv", found)
    text = readme.guidance(tmp_path)
    assert text.splitlines()[0] == "| L1 to the teacher | g = 1.5 | g = 2 | g = 10 |"
    assert "| best classical | 0.8000 | 0.9600 | 1.6000 |" in text and text.endswith("| 1.05 | 1.05 | 1.05 |\n")


def test_readme_blocks_are_replaced_where_there_are_rows(tmp_path):
    text = "a\n<!-- results:students -->\nold\n<!-- /results -->\nb\n<!-- results:gas -->\nkept\n<!-- /results -->\n"
    tables.write(tmp_path / "main.csv", [row("GS", 4, 0.0123, updates="5"), row("LD3", 4, 0.2, updates="5")])
    new = readme.filled(text, tmp_path)
    assert "| GS | **0.0123** |\n| LD3 | 0.2000 |\n<!-- /results -->\nb\n" in new and "old" not in new and "kept" in new
    assert readme.filled(new, tmp_path) == new
    with pytest.raises(KeyError, match="nothing"):
        readme.filled("<!-- results:nothing -->\n<!-- /results -->", tmp_path)
