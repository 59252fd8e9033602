"""Training against a reference run, exact resumption, and what happens when numbers stop being finite."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy
from twin import relative

from gas_engine import BELMSolver, Denoiser, GeneralizedSolver, MemoryPolicy, load_solver, train
from gas_engine.execution import Execution
from gas_engine.losses import distillation_loss
from gas_engine.training import setup
from gas_engine.training.opening import opened
from gas_engine.training.recipe import RECIPES, Recipe
from gas_engine.training.soap import SOAP
from gas_engine.training.trainer import PATIENCE, NotFinite, OutOfMemory, Trainer

HERE = Path(__file__).parent


def flat(solver, grad=False):
    """Reference order: theta, xi, c_1, a_1, c_2, a_2, ..."""
    of = (lambda p: p.grad) if grad else (lambda p: p.detach())
    rows = [of(solver.theta), of(solver.xi)]
    for lag in range(solver.order):
        rows += [of(solver.phi_c)[:, lag], of(solver.phi_a)[:, lag]]
    return torch.cat(rows).clone()


@pytest.mark.parametrize("every", [0, 1, 3])
def test_twenty_iterations_match_reference(golden, tiny, every, monkeypatch):
    """Losses, gradients, parameters and averages of Adam 1e-3, clip 1.0, EMA 0.999 with warm-up, in float64."""
    data, wanted = golden("train_data"), golden("train_loss_l1_f64")
    denoiser = tiny(1e-3)
    solver = GeneralizedSolver(4, denoiser.schedule, 1e-3)
    recipe = Recipe(iterations=20, batch=8, rate=1e-3, cosine=False, ema=0.999, start_grid="uniform")
    noise, grads = data["noise"].double(), []
    monkeypatch.setattr("gas_engine.training.trainer.seeded", lambda denoiser, rows: (noise[rows], None))
    original = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, n: (grads.append(flat(solver, True)), original(p, n))[1]
    )
    trainer = Trainer(
        denoiser,
        solver,
        list(range(64)),
        data["targets"].double(),
        distillation_loss("l1"),
        recipe,
        Execution(MemoryPolicy(every)),
    )
    trainer.rows = lambda step: data["idx"][step].tolist()
    for step, loss in trainer:
        assert float(loss) == pytest.approx(float(wanted["losses"][step - 1]), rel=1e-7)
        assert relative(grads[-1], wanted["grads"][step - 1]) < 1e-7
        assert relative(flat(solver), wanted["params"][step]) < 1e-7
        assert relative(flat(trainer.average), wanted["ema"][step]) < 1e-7
    assert trainer.step == 20 and trainer.skipped == 0


def toy_trainer(denoiser=None, iterations=8, optimizer="adam", execution=None, **options):
    denoiser = denoiser or toy.mixture()
    solver = GeneralizedSolver(3, denoiser.schedule, start="quadratic")
    recipe = Recipe(iterations=iterations, batch=4, rate=1e-2, cosine=True, ema=0.9, start_grid="", optimizer=optimizer)
    targets = torch.zeros(10, *toy.SHAPE)
    return Trainer(
        denoiser, solver, list(range(10)), targets, distillation_loss("l2"), recipe, execution or Execution(), **options
    )


def test_out_of_memory_falls_to_the_next_cheaper_way_and_loses_nothing():
    """A network that fits two samples: the parameters, to rounding, of a micro-batch of two from the start."""
    inner, calls = toy.mixture(), []

    class Small(torch.nn.Module):
        def forward(self, x, t, cond):
            if torch.is_grad_enabled():
                calls.append(len(x))
                if len(x) > 2 and len(calls) > 8:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return inner(x, t, cond)

    trainer = toy_trainer(Denoiser(Small(), inner.schedule, "data", toy.SHAPE))
    for _ in trainer:
        pass
    wanted = toy_trainer(inner, execution=Execution(micro_batch=2))
    for _ in wanted:
        pass
    assert relative(flat(trainer.solver), flat(wanted.solver)) < 1e-6 and trainer.skipped == 0 and trainer.step == 8
    assert [n.partition(";")[0] for n in trainer.notices] == [
        "update 2: out of memory with micro-batch all, 1 graph(s)",
        "update 2: out of memory with micro-batch all, 1 graph(s), lean",
    ]
    assert trainer.notices[-1].endswith("going on with micro-batch 2, 1 graph(s), lean")


def test_out_of_memory_with_nothing_left_to_save():
    def never(x, t, cond):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nlong story")

    trainer = toy_trainer(Denoiser(never, toy.mixture().schedule, "data", toy.SHAPE))
    with pytest.raises(OutOfMemory, match=r"at update 0, and there is no cheaper way .* 2 GiB\).*--resume"):
        trainer.update()
    assert len(trainer.notices) == 4  # micro-batches of 2 and 1, the loss alone, offload


def test_batches_are_epochs_that_depend_on_the_seed_alone():
    trainer = toy_trainer()
    seen = [row for step in range(5) for row in trainer.rows(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert [toy_trainer().rows(3), toy_trainer(seed=1).rows(3)][0] == trainer.rows(3)
    assert toy_trainer(seed=1).rows(3) != trainer.rows(3)


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_state_goes_on_bit_for_bit(optimizer):
    whole = toy_trainer(optimizer=optimizer)
    for _ in whole:
        pass
    first, second = toy_trainer(optimizer=optimizer), toy_trainer(optimizer=optimizer)
    while first.step < 4:
        first.update()
    tensors, numbers = first.state()
    second.load(4, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(numbers)))
    for _ in second:
        pass
    for key, value in whole.state()[0].items():
        assert torch.equal(value, second.state()[0][key]), key


def test_updates_that_are_not_finite_change_nothing_and_stop_after_patience():
    trainer = toy_trainer(toy.make_late_nan(), iterations=100)
    before = flat(trainer.solver)
    with pytest.raises(NotFinite, match=rf"{PATIENCE} updates in a row .* lower --rate"):
        for _ in trainer:
            assert torch.equal(flat(trainer.solver), before)
    assert trainer.skipped == PATIENCE and bool(torch.isfinite(flat(trainer.solver)).all())


def test_a_single_bad_update_is_skipped():
    trainer, calls = toy_trainer(iterations=6), []
    loss = trainer.loss
    trainer.loss = lambda x, y: (calls.append(1), loss(x, y) * (torch.nan if len(calls) == 3 else 1.0))[1]
    for _ in trainer:
        pass
    assert trainer.skipped == 1 and trainer.step == 6 and bool(torch.isfinite(flat(trainer.solver)).all())


def test_soap_is_adam_where_coordinates_are_independent():
    """With a diagonal covariance the eigenbasis is the axes, so the first steps equal Adam's."""
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    results = []
    for make in (lambda p: SOAP([p], lr=0.1, betas=(0.9, 0.95)), lambda p: torch.optim.Adam([p], 0.1, (0.9, 0.95))):
        p = start.clone().requires_grad_()
        optimizer = make(p)
        for axis in (0, 1, 2, 1):
            p.grad = torch.zeros(3, dtype=torch.float64)
            p.grad[axis] = p[axis].detach() * 10.0**axis
            optimizer.step()
        results.append(p.detach())
    assert torch.allclose(results[0], results[1], atol=1e-9)


def test_soap_crosses_a_narrow_valley_faster_than_adam():
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    curvature = turn @ torch.diag(torch.logspace(0, -4, 6, dtype=torch.float64)) @ turn.T
    left = []
    for make in (lambda p: SOAP([p], lr=0.02), lambda p: torch.optim.Adam([p], lr=0.02)):
        p = torch.ones(6, dtype=torch.float64, requires_grad=True)
        optimizer = make(p)
        for _ in range(200):
            optimizer.zero_grad()
            (p @ curvature @ p / 2).backward()
            optimizer.step()
        left.append(float((p @ curvature @ p).detach()))
    assert left[0] < 0.1 * left[1]


def test_recipes_are_the_documented_ones():
    assert RECIPES["paper"] == Recipe(10_000, 24, 1e-3, False, 0.999, "uniform")
    quick = RECIPES["quick"]
    assert (quick.rate, quick.cosine, quick.ema, quick.start_grid) == (1e-2, True, 0.99, "quadratic")
    assert (RECIPES["paper"].optimizer, quick.optimizer) == ("adam", "soap")
    assert quick.rate_at(0) == 1e-2 and quick.rate_at(quick.iterations) == pytest.approx(0, abs=1e-12)


# The verb


def options(out, *more):
    return [
        "--model", "toy:make", "--steps", "2", "--recipe", "quick", "--train-seeds", "0-31", "--batch", "4",
        "--teacher-set", str(out.parent / "teacher"), "--out", str(out), "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Small evaluation sets and a path to the toy model."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(setup, "SELECTION_SEEDS", range(40_000, 40_008))
    monkeypatch.setattr(setup, "HELD_OUT_SEEDS", range(50_000, 50_016))


def test_run_directory_is_complete_and_resume_is_exact(small, tmp_path):
    """A run that is stopped at a checkpoint and resumed ends with the very bytes of one that was not."""
    every = ["--save-every", "3", "--sample-every", "6", "--log-every", "2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train.main(options(whole, "--iterations", "6", *every))
    train.main(options(resumed, "--iterations", "6", *every))
    # As if killed after update 4: its last checkpoint is that of update 3.
    for path in (resumed / "checkpoints").glob("step-000006/*"):
        path.unlink()
    (resumed / "checkpoints" / "step-000006").rmdir()
    train.main(["--out", str(resumed), "--resume", "--device", "cpu"])
    for name in ("checkpoints/step-000006/state.safetensors", "solver.safetensors", "comparison.csv"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    steps = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert {
        "config.json", "metrics.jsonl", "solver.safetensors", "comparison.md", "comparison.png", "schedule.png",
        "tableau.png", "samples/step-000006.png", "checkpoints/step-000006/manifest.json",
    } <= names  # fmt: skip
    assert any(name.startswith("events.") for name in names)
    assert not any(".tmp" in name for name in names)
    solver = load_solver(whole / "solver.safetensors", model="mixture")
    assert solver.steps == 2 and set(solver.facts["metrics"]) >= {"l1", "rmse", "psnr"}
    table = (whole / "comparison.md").read_text()
    assert all(name in table for name in ("learned", "DDIM", "Heun", "UniPC", "iPNDM", "DEIS", "DPM-Solver++(3M)"))


def test_reversible_student_trains_saves_and_resumes(small, tmp_path):
    """belm in reverse: the same solver as with all states kept, and the bits that its codes held are logged."""
    short = ["--student", "belm", "--iterations", "6", "--save-every", "3", "--log-every", "3", "--steps", "4"]
    back, kept = tmp_path / "back", tmp_path / "kept"
    train.main(options(back, *short, "--trajectory", "reversible", "--evaluation", "student"))
    train.main(options(kept, *short, "--micro-batch", "3", "--lean", "--loss-alone", "--evaluation", "student"))
    solvers = [load_solver(d / "solver.safetensors", model="mixture") for d in (back, kept)]
    assert all(isinstance(s, BELMSolver) and s.steps == 4 for s in solvers)
    assert relative(flat_of(solvers[0]), flat_of(solvers[1])) < 1e-3
    rows = [json.loads(line) for line in (back / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["bits_lost"] < 8 for row in rows)
    # What saves memory may be changed when going on; what was not given stays as it was.
    for path in (kept / "checkpoints").glob("step-000006/*"):
        path.unlink()
    (kept / "checkpoints" / "step-000006").rmdir()
    train.main(["--out", str(kept), "--resume", "--device", "cpu", "--micro-batch", "2", "--evaluation", "student"])
    assert relative(flat_of(load_solver(kept / "solver.safetensors")), flat_of(solvers[1])) < 1e-3


def test_a_budget_chooses_how_updates_run(small, tmp_path, capsys):
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


def test_options_of_memory_may_be_given_anew_when_resuming(small, tmp_path, capsys):
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


def test_weights_may_be_streamed_or_held_in_eight_bits(small, tmp_path):
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


def flat_of(solver):
    return torch.cat([p.detach().flatten() for p in solver.parameters()])


def test_damaged_checkpoint_falls_back_to_the_one_before(small, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(options(out, "--iterations", "6", "--save-every", "2"))
    state = out / "checkpoints" / "step-000006" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    train.main(["--out", str(out), "--resume", "--device", "cpu"])
    assert "at update 4" in capsys.readouterr().out


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
        (["--memory-budget", "80%"], "a number of bytes with its unit, such as 8GiB or 500MB, got '80%'"),
        (["--memory-budget", "1KiB"], "no plan fits into"),
        (["--memory-budget", "1GiB", "--lean", "--micro-batch", "2"], "chooses --micro-batch, --lean, which was given"),
        (["--carry"], "carry=True belongs to"),
        (["--micro-batch", "0"], "micro_batch must be at least 1, got 0"),
        (["--log-every", "0"], "--log-every must be at least 1"),
        (["--model", "toy:make_broken"], "not finite"),
        (["--loss", "lpips"], "neither in the cache"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_nothing_written(small, tmp_path, capsys, more, seen, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty-cache"))
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


def test_a_run_is_not_overwritten_nor_changed(small, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(options(out, "--iterations", "2"))
    for more, seen in (([], "already holds a run"), (["--resume", "--steps", "3"], "steps=2")):
        with pytest.raises(SystemExit) as stop:
            train.main(options(out, "--iterations", "2", *more))
        assert stop.value.code == 2 and seen in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "absent"), "--resume"])
    assert "no run to resume" in capsys.readouterr().err


def test_skipped_updates_are_announced_and_the_student_alone_is_measured(small, tmp_path, capsys, monkeypatch):
    calls = []

    def loss(x, y):
        calls.append(1)
        return (x - y).abs().flatten(1).mean(1) * (torch.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(train, "distillation_loss", lambda *_: loss)
    train.main(options(tmp_path / "run", "--iterations", "5", "--evaluation", "student"))
    assert "update 3: loss or gradient not finite, skipped (1 so far)" in capsys.readouterr().out
    assert len((tmp_path / "run" / "comparison.csv").read_text().splitlines()) == 2


def test_trainable_model_is_frozen_by_the_command_line(small, tmp_path, monkeypatch):
    def make():
        denoiser = toy.make()
        denoiser.function.extra = torch.nn.Parameter(torch.ones(()))
        return denoiser

    monkeypatch.setattr(toy, "make_trainable", make, raising=False)
    more = ["--iterations", "2", "--model", "toy:make_trainable", "--evaluation", "student"]
    train.main(options(tmp_path / "run", *more))
    assert (tmp_path / "run" / "solver.safetensors").exists()


def test_quick_recipe_beats_every_classical_solver(tmp_path, monkeypatch):
    """The default run on the digits: held-out L1 at most 1/2.5 of the best classical solver's at K = 4."""
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint-every", "1", "--device", "cpu"])
    rows = (tmp_path / "runs" / "digits-gs-k4" / "comparison.csv").read_text().splitlines()[1:]
    l1 = [float(row.rsplit(",", 3)[1]) for row in rows]
    assert l1[0] * 2.5 <= min(l1[1:]) and len(rows) == 8


def test_killed_run_resumes(tmp_path):
    """SIGKILL in the middle of a run; what is left resumes to the end."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "gas_engine.train", *options(out, "--iterations", "100000", "--save-every", "5")]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not list(out.glob("checkpoints/step-*")):
        assert process.poll() is None and time.time() < deadline, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    config = json.loads((out / "config.json").read_text())
    newest = max(int(p.name.removeprefix("step-")) for p in out.glob("checkpoints/step-*"))
    (out / "config.json").write_text(json.dumps({**config, "iterations": newest + 2}))
    code = (
        "import sys; from gas_engine import train; from gas_engine.training import setup\n"
        "setup.SELECTION_SEEDS = range(40000, 40008); train.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--out", str(out), "--resume"], cwd=HERE, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "solver.safetensors").exists() and f"at update {newest}" in done.stdout
