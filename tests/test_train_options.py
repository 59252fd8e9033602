"""The options of ``train``: students, memory, rates, loggers, early stopping, and input that is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import types

import pytest
import torch
import toy
from runs import brief, flat_of, options, rows
from twin import relative

from gas_engine import BELMSolver, load_denoiser, load_solver, report, train
from gas_engine.denoiser import seeded
from gas_engine.memory import ByteTracker
from gas_engine.planner import plan
from gas_engine.training import setup
from gas_engine.training.loggers import logger
from gas_engine.training.opening import opened
from gas_engine.training.recipe import Recipe
from gas_engine.training.students import new_solver


def test_reversible_student_trains_saves_and_resumes(small, no_pictures, tmp_path):
    """belm in reverse: the same solver as with all states kept, and the bits that its codes held are logged."""
    short = ["--student", "belm", "--iterations", "6", "--save-every", "3", "--log-every", "3", "--steps", "4"]
    back, kept = tmp_path / "back", tmp_path / "kept"
    train.main(options(back, *short, "--trajectory", "reversible", "--evaluation", "student"))
    train.main(options(kept, *short, "--micro-batch", "3", "--lean", "--loss-alone", "--evaluation", "student"))
    solvers = [load_solver(d / "solver.safetensors", model="mixture") for d in (back, kept)]
    assert all(isinstance(s, BELMSolver) and s.steps == 4 for s in solvers)
    assert relative(flat_of(solvers[0]), flat_of(solvers[1])) < 1e-3
    assert all(0 < row["bits_lost"] < 8 for row in rows(back) if "bits_lost" in row)
    # What saves memory may be changed when going on; what was not given stays as it was.
    for path in (kept / "checkpoints").glob("step-000006/*"):
        path.unlink()
    (kept / "checkpoints" / "step-000006").rmdir()
    train.main(["--out", str(kept), "--resume", "--device", "cpu", "--micro-batch", "2", "--evaluation", "student"])
    assert relative(flat_of(load_solver(kept / "solver.safetensors")), flat_of(solvers[1])) < 1e-3


def test_a_budget_chooses_how_updates_run(small, no_pictures, tmp_path, capsys):
    """The same solver, to rounding, in a few kilobytes as in as many as it likes; the plan is said and written."""
    short = ["--model", "toy:make_perceptron", "--iterations", "3", "--evaluation", "student", "--steps", "3"]
    for name, budget in (("wide", "1GiB"), ("narrow", "19KiB")):
        train.main(options(tmp_path / name, *short, "--memory-budget", budget))
        said = capsys.readouterr().out
        assert ("plan      micro-batch 4, all graph(s)" in said) == (name == "wide")
        table = (tmp_path / name / "plan.csv").read_text()
        assert table.startswith("weights,blocks") and len(table.splitlines()) > 5
    wide, narrow = (load_solver(tmp_path / name / "solver.safetensors") for name in ("wide", "narrow"))
    assert relative(flat_of(narrow), flat_of(wide)) < 1e-4


def test_options_of_memory_may_be_given_anew_when_resuming(small, no_pictures, tmp_path, capsys):
    """Also back to their defaults; a stored budget gives way to what is chosen by hand; other weights are no memory."""
    out = tmp_path / "run"
    short = ["--model", "toy:make_perceptron", "--iterations", "1", "--evaluation", "student"]
    train.main(options(out, *short, "--memory-budget", "1GiB"))
    asked = train.Config(out=out, resume=True)
    assert opened(asked, ())[1].memory_budget == "1GiB"
    by_hand = opened(asked, {"checkpoint_every"})[1]
    assert by_hand.memory_budget is None and by_hand.checkpoint_every == 1
    stored = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**stored, "memory_budget": None, "checkpoint_every": 0}))
    assert opened(asked, ())[1].checkpoint_every == 0
    assert opened(asked, {"checkpoint_every"})[1].checkpoint_every == 1
    with pytest.raises(SystemExit):
        train.main(["--out", str(out), "--resume", "--weights", "int8"])
    assert "continues with weights='resident'" in capsys.readouterr().err


def test_a_default_that_is_given_is_refused_where_the_run_has_another(small, no_pictures, tmp_path, capsys):
    """A resumed run says what it cannot do instead of going on without; what its directory has may be said again."""
    out = tmp_path / "run"
    stored = ["--clip", "0.5", "--teacher.steps", "8", "--precision", "bf16", "--channels-last"]
    train.main(brief(out, "--model", "toy:make_perceptron", "--iterations", "1", *stored, "--lean"))
    for words, seen in (
        (("--clip", "1.0"), "continues with clip=0.5"),
        (("--precision", "fp32"), "continues with precision='bf16'"),
        (("--teacher.steps", str(train.Config().teacher.steps)), "continues with teacher.steps=8"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--out", str(out), "--resume", *words])
        assert seen in capsys.readouterr().err
    assert train._given(["--no-lean", "--resume", "--logger=none"]) == {"lean", "resume", "logger"}
    asked = train.Config(out=out, resume=True)
    assert opened(asked, ())[1].lean and not opened(asked, train._given(["--no-lean"]))[1].lean
    chunked = dataclasses.replace(asked, loss_chunk=2, loss_cache="1MiB")
    assert opened(chunked, ())[1].loss_chunk == 2 and opened(chunked, ())[1].loss_cache == "1MiB"
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student", *stored, "--lean"])


def test_a_run_may_draw_nothing(small, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(brief(out, "--iterations", "2", "--no-pictures"))
    made = {path.name for path in out.rglob("*") if path.is_file()}
    assert {"solver.safetensors", "comparison.csv"} <= made
    assert not [name for name in made if name.endswith((".png", ".html"))]
    said = capsys.readouterr().out
    assert "sample    python" in said and "pictures  " not in said
    report.main([str(out)])
    assert (out / "report.html").exists()


def test_a_patience_that_cannot_end_a_run_is_told(tmp_path, capsys):
    for evaluations, told in ((3, False), (4, True)):
        opened(train.Config(out=tmp_path, iterations=9, evaluate_every=2, patience=evaluations), ())
        assert ("cannot end a run of 9 early" in " ".join(capsys.readouterr().out.split())) == told


def test_measurements_fit_the_budget_too():
    """Samples at a time without gradients, by the tracker's peak."""
    denoiser = load_denoiser("digits")
    plans = plan(denoiser, 4, 24, "24MiB")
    found = setup.sample_batch(plans, denoiser)
    room = plans.budget - plans.iteration.weight_bytes("resident")

    def peak(batch):
        noise, cond = seeded(denoiser, range(batch))
        with torch.no_grad(), ByteTracker() as tracker:
            denoiser(noise, torch.tensor(0.5, dtype=torch.float64), cond)
        return tracker.peak

    assert found > 24 and peak(found) <= room < peak(int(1.3 * found))


def test_pairs_that_were_given_are_kept_by_a_budget(monkeypatch, capsys):
    """In less than they take no plan fits; a number that was not given is chosen to fit."""
    monkeypatch.setattr(setup, "evaluation_seconds", lambda *_: 1.0)
    config = train.Config(adversarial=True, batch=8, steps=2, discriminator_micro_batch=8)
    denoiser, device = load_denoiser("digits"), torch.device("cpu")
    recipe = setup.recipe(config)
    solver = new_solver(config, denoiser, recipe)

    def planned(pairs, budget):
        asked = dataclasses.replace(config, discriminator_micro_batch=pairs, memory_budget=f"{budget}B")
        adversary = setup.adversary(asked, denoiser, recipe, device)
        return setup.plans(asked, denoiser, denoiser, recipe, solver, device, adversary=adversary), adversary

    least = {pairs: planned(pairs, 2**30)[0].smallest.bytes for pairs in (1, 8)}
    assert least[1] < 0.9 * least[8]
    with pytest.raises(ValueError, match="no plan fits"):
        planned(8, (least[1] + least[8]) // 2)
    capsys.readouterr()
    _, adversary = planned(None, (least[1] + least[8]) // 2)
    pairs = adversary.settings.micro_batch
    assert pairs < 8 and f", {pairs} pair(s) at a time" in capsys.readouterr().out


def test_a_plan_knows_the_chunk_of_the_loss(monkeypatch):
    monkeypatch.setattr(setup, "evaluation_seconds", lambda *_: 1.0)
    denoiser, peaks = load_denoiser("digits"), []
    for chunk in (None, 1):
        config = train.Config(batch=8, steps=2, loss="l2", loss_chunk=chunk, memory_budget="1GiB")
        recipe = setup.recipe(config)
        solver = new_solver(config, denoiser, recipe)
        found = setup.plans(config, denoiser, denoiser, recipe, solver, torch.device("cpu"))
        peaks.append(found.choice.peaks.loss)
    assert peaks[1] < peaks[0]


def test_weights_may_be_streamed_or_held_in_eight_bits(small, no_pictures, tmp_path):
    """Streamed: the same solver to the bit. Eight bits: another network, and a solver for it."""
    short = ["--model", "toy:make_perceptron", "--iterations", "3", "--evaluation", "student"]
    places = ["resident", "streamed"]
    if importlib.util.find_spec("torchao"):
        places.append("int8")
    for place in places:
        own = ["--teacher-set", str(tmp_path / f"teacher-{place}"), "--checkpoint-blocks", "auto"]
        train.main(options(tmp_path / place, *short, *own, "--weights", place))
    resident, streamed, *rest = (load_solver(tmp_path / place / "solver.safetensors") for place in places)
    assert torch.equal(flat_of(resident), flat_of(streamed))
    assert all(relative(flat_of(held), flat_of(resident)) < 0.1 for held in rest)


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        (["--steps", "0"], "between 1 and 32, got 0"),
        (["--steps", "99"], "between 1 and 32, got 99"),
        (["--model", "nothing"], "unknown model 'nothing'"),
        (["--model", "toy:absent"], "toy:absent"),
        (["--start-grid", "cosine"], "cosine"),
        (["--checkpoint-every", "-2"], "-2"),
        (["--iterations", "0"], "iterations"),
        (["--train-seeds", "0-31,40005"], "40005"),
        (["--train-seeds", "three"], "three"),
        (["--teacher.solver", "rk45"], "rk45"),
        (["--teacher.steps", "0"], "at least 1, got 0"),
        (["--device", "tpu9"], "tpu9"),
        (["--trajectory", "reversible"], "gs has a full history; use --student belm"),
        (["--student", "belm", "--trajectory", "reversible", "--offload"], "leave one out"),
        (["--student", "belm", "--order", "2"], "takes no --order, got 2"),
        (["--memory-budget", "80%"], "bytes are a number with its unit, such as 8GiB, got '80%'"),
        (["--memory-budget", "1KiB"], "no plan fits into"),
        (["--memory-budget", "1GiB", "--lean", "--micro-batch", "2"], "chooses --micro-batch, --lean, which was given"),
        (["--carry"], "carry=True belongs to"),
        (["--micro-batch", "0"], "micro_batch must be at least 1, got 0"),
        (["--log-every", "0"], "--log-every must be at least 1"),
        (["--model", "toy:make_broken"], "not finite"),
        (["--keep", "1"], "--keep must be at least 2, got 1"),
        (["--patience", "3", "--evaluate-every", "0"], "--patience 3 counts measurements"),
        (["--clip", "0"], "--clip above 0, got 0 and 0"),
        (["--rate-warm-up", "5", "--iterations", "5"], "--rate-warm-up must be shorter than the 5 updates"),
        (["--logger", "wandb"], "--logger wandb needs the wandb package: `pip install wandb`"),
        (["--logger", "trackio"], "`pip install trackio`, or use --logger tensorboard"),
        (["--gamma", "0.1"], "--gamma 0.1 is of a discriminator, and there is none; give --adversarial as well"),
        (["--no-adversarial", "--fakes", "fresh"], "--fakes fresh is of a discriminator"),
        (["--adversarial", "--warm-up", "3", "--iterations", "3"], "--warm-up must leave some of the 3 updates"),
        (["--compare", "absent.safetensors", "--iterations", "1"], "absent.safetensors"),
        (["--loss", "lpips", "--loss-cache", "4"], "bytes are a number with its unit, such as 8GiB, got '4'"),
        (["--out", "/proc/run", "--model", "nothing"], "cannot write to /proc/run"),
        (["--loss", "lpips"], "neither in the cache"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_nothing_written(small, tmp_path, capsys, more, seen, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty-cache"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", _offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _offline, raising=False)
    with pytest.raises(SystemExit) as stop:
        train.main(options(tmp_path / "run", *more))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and seen in error and "Traceback" not in error
    assert error.startswith("gas-engine train: ") and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("*.tmp*"))


def _offline(*_, **__):
    raise OSError("no route to host")


def test_a_run_is_not_overwritten_nor_changed(small, no_pictures, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(options(out, "--iterations", "2"))
    for more, seen in (([], "already holds a run"), (["--resume", "--steps", "3"], "steps=2")):
        with pytest.raises(SystemExit) as stop:
            train.main(options(out, "--iterations", "2", *more))
        assert stop.value.code == 2 and seen in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "absent"), "--resume"])
    assert "no run to resume" in capsys.readouterr().err


def test_trainable_model_is_frozen_by_the_command_line(small, no_pictures, tmp_path, monkeypatch):
    def make():
        denoiser = toy.make()
        denoiser.function.extra = torch.nn.Parameter(torch.ones(()))
        return denoiser

    monkeypatch.setattr(toy, "make_trainable", make, raising=False)
    more = ["--iterations", "2", "--model", "toy:make_trainable", "--evaluation", "student"]
    train.main(options(tmp_path / "run", *more))
    assert (tmp_path / "run" / "solver.safetensors").exists()


def test_course_of_the_learning_rate():
    """Against PyTorch's own schedulers; a warm-up is a line up to where they begin."""
    for name, make in (
        ("constant", lambda o, n: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        ("cosine", lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n)),
        ("linear", lambda o, n: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, n)),
    ):
        recipe = Recipe(30, 1, 0.2, name, 0.9, "", rate_warm_up=10)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
        scheduler = make(optimizer, 20)
        assert [recipe.rate_at(step) for step in range(10)] == pytest.approx([0.2 * (i + 1) / 11 for i in range(10)])
        for step in range(10, 30):
            assert recipe.rate_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            scheduler.step()


def test_rate_options_reach_the_optimiser(small, no_pictures, tmp_path):
    more = [
        "--iterations",
        "5",
        "--rate",
        "0.01",
        "--rate-schedule",
        "linear",
        "--rate-warm-up",
        "1",
        "--log-every",
        "1",
    ]
    train.main(brief(tmp_path / "run", *more, "--clip", "0.5"))
    assert [row["rate"] for row in rows(tmp_path / "run")] == pytest.approx([0.005, 0.01, 0.0075, 0.005, 0.0025])
    assert not torch.equal(*(flat_of(after(tmp_path / name, "--rate", "0.01", *clip)) for name, clip in CLIPS))


CLIPS = (("free", ("--optimizer", "adam")), ("clipped", ("--optimizer", "adam", "--clip", "1e-9")))


def after(out, *more):
    """The solver of a run of two updates."""
    train.main(brief(out, "--iterations", "2", *more))
    return load_solver(out / "solver.safetensors")


def test_early_stopping_ends_with_the_nearest_solver(small, no_pictures, tmp_path, capsys):
    """A rate so high that the distance rises: the run ends ``patience`` measurements after its least."""
    out = tmp_path / "run"
    more = ["--iterations", "60", "--rate", "0.3", "--rate-schedule", "constant", "--ema", "0"]
    train.main(brief(out, *more, "--evaluate-every", "2", "--patience", "3", "--save-every", "4"))
    measured = {row["step"]: row["distance"] for row in rows(out) if "distance" in row}
    best = min(measured, key=measured.get)
    assert max(measured) == best + 3 * 2 < 60
    assert f"the average of update {best}, the nearest to the teacher" in capsys.readouterr().out
    solver, kept = (load_solver(out / f"{name}.safetensors") for name in ("solver", "best"))
    assert torch.equal(flat_of(solver), flat_of(kept))
    assert kept.facts["metrics"]["l1"] == measured[best] and kept.facts["metrics"]["updates"] == best
    # A resumed run knows that it was done.
    before = (out / "solver.safetensors").read_bytes()
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
    assert f"at update {best + 6}" in capsys.readouterr().out and (out / "solver.safetensors").read_bytes() == before


class Service(types.ModuleType):
    """W&B or trackio, as far as a run talks to it."""

    def __init__(self, name, fails=False):
        super().__init__(name)
        self.opened, self.rows, self.closed, self.fails = {}, [], 0, fails

    def init(self, **options):
        self.opened = options
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row, step=None):
        if self.fails:
            raise ConnectionError("no network")
        self.rows.append({"step": step, **row})

    def finish(self):
        self.closed += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_rows_go_to_a_service_that_was_asked_for(small, no_pictures, tmp_path, monkeypatch, name):
    """What metrics.jsonl has and the learned times; a resumed run goes on in the same place."""
    service, out = Service(name), tmp_path / "run"
    monkeypatch.setitem(sys.modules, name, service)
    train.main(brief(out, "--iterations", "4", "--log-every", "2", "--logger", name))
    assert service.opened["project"] == "gas_engine" and service.opened["resume"] == "allow"
    assert service.opened["config"]["iterations"] == 4 and service.closed == 1
    assert [{k: v for k, v in row.items() if "/" not in k} for row in service.rows] == rows(out)
    assert all({"times/0", "times/1", "times/2"} <= row.keys() for row in service.rows)
    first = service.opened
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
    assert service.closed == 2 and service.opened.get("id") == first.get("id") and service.opened["name"] == "run"


def test_a_service_that_fails_is_left_out(small, no_pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Service("wandb", fails=True))
    train.main(brief(tmp_path / "run", "--iterations", "4", "--log-every", "1", "--logger", "wandb"))
    said = capsys.readouterr().out
    assert said.count("wandb failed (no network) and is left out") == 1 and len(rows(tmp_path / "run")) == 4


def test_any_column_reaches_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logger("tensorboard", tmp_path, {}, 0) as write:
        write(1, {"loss": 0.5, "adversary_loss": 2, "times/0": 1.0, "note": "no number"})
        write(2, {"loss": None, "adversary_loss": 3})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/adversary_loss", "times/0"}
    assert [(e.step, e.value) for e in events.Scalars("train/adversary_loss")] == [(1, 2.0), (2, 3.0)]
    assert events.Scalars("train/loss")[1].value != events.Scalars("train/loss")[1].value  # nan
