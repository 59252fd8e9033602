"""One solver for a range of K: its polynomials, its theory, its gradient, its files, and a run."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import HERE, brief
from twin import plain_rollout, relative

from gas_engine import GeneralizedSolver, MemoryPolicy, convert, load_solver, rollout, sample, save_solver, train
from gas_engine.denoiser import seeded
from gas_engine.execution import Execution
from gas_engine.export.numbers import opened
from gas_engine.losses import distillation_loss
from gas_engine.solvers import AnyStepsSolver, classical, grid
from gas_engine.solvers.any_steps import TABLES, polynomials
from gas_engine.solvers.files import write_readable
from gas_engine.teacher import TeacherSolver, teacher_samples
from gas_engine.training.directory import RunDirectory
from gas_engine.training.recipe import RECIPES
from gas_engine.training.trainer import Trainer

RANGE = range(2, 6)


@pytest.fixture(autouse=True)
def beside_the_toy_model(monkeypatch):
    monkeypatch.chdir(HERE)


def new(steps=RANGE, scale=0.0, **options):
    """A solver, its numbers drawn."""
    solver = AnyStepsSolver(steps, toy.mixture().schedule, start="quadratic", **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in solver.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def tables(solver):
    return {name: value.detach() for name in TABLES for value in (getattr(solver, name),)}


@pytest.mark.parametrize("steps", RANGE)
def test_zero_is_theory_at_every_k(steps):
    """DPM-Solver++(3M) of the classical module, and to the bit the Generalized Solver of that K alone."""
    schedule, found = toy.mixture().schedule, new().at(steps)
    alone = GeneralizedSolver(steps, schedule, start="quadratic")
    times = grid("quadratic", schedule, steps, 1e-3)
    theory = classical.dpmpp(schedule, times, 3, lower_order_final=False).fold("data")
    for prediction in ("data", "noise"):
        mine, other = found.tableau(prediction), alone.tableau(prediction)
        assert all(torch.equal(getattr(mine, name), getattr(other, name)) for name in ("A", "B", "t_net"))
    assert relative(found.tableau().A, theory.A) < 1e-9 and relative(found.tableau().B, theory.B) < 1e-9
    assert found.config() == alone.config() and found.state_dict().keys() == alone.state_dict().keys()


@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 2), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_polynomials_are_orthonormal_and_hold_all_of_their_degree(low, more, dimensions, degree):
    rows = polynomials(low, low + more, dimensions, degree)
    q = torch.cat(list(rows.values()))
    assert torch.allclose(q.T @ q, torch.eye(q.shape[1], dtype=torch.float64), atol=1e-9)
    points = [
        (k, n / max(k - 1, 1), lag)
        for k in range(low, low + more + 1)
        for n in range(k)
        for lag in range(n + 1 if dimensions == 2 else 1)
    ]
    assert [len(row) for row in rows.values()] == [sum(p[0] == k for p in points) for k in rows]
    k, position, lag = torch.tensor(points, dtype=torch.float64).unbind(1)
    highest = min(degree, low + more - 1)
    if highest >= low + more - 1:
        assert q.shape[0] == q.shape[1]  # any table of any K
    for wanted in (k**0, *((k, position, lag) if highest else ()), *((k * position, lag * k) if highest > 1 else ())):
        assert torch.allclose(q @ (q.T @ wanted), wanted, atol=1e-8)


def test_at_full_degree_every_k_can_have_any_table():
    """The tables of Generalized Solvers of each K, fitted into one solver."""
    solver, generator = new(), torch.Generator().manual_seed(0)
    wanted = {k: GeneralizedSolver(k, solver.schedule, start="quadratic").requires_grad_(False) for k in RANGE}
    for alone in wanted.values():
        for parameter in alone.parameters():
            drawn = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += drawn.tril() if drawn.ndim == 2 else drawn
    for name in TABLES:
        matrix = torch.cat([solver._polynomials(name, k) for k in RANGE])
        change = [getattr(wanted[k], name) - getattr(solver.at(k), name).detach() for k in RANGE]
        flat = [c[tuple(torch.tril_indices(*c.shape))] if c.ndim == 2 else c for c in change]
        getattr(solver, name).data = torch.linalg.solve(matrix, torch.cat(flat))
    for k in RANGE:
        assert all(torch.allclose(value, tables(wanted[k])[name]) for name, value in tables(solver.at(k)).items())


def test_of_degree_one_tables_are_planes():
    """Times aside, whose start is a grid: second differences of a told time's offset vanish at every K."""
    solver = new(scale=0.1, degree=1)
    assert solver.phi_a.shape == (4,) and solver.xi.shape == (3,)
    for k in RANGE[1:]:
        assert float(solver.at(k).xi.detach().diff(n=2).abs().max()) < 1e-12
        assert float(solver.at(k).phi_c.detach().diagonal().diff(n=2).abs().max()) < 1e-12


@pytest.mark.parametrize("steps", [2, 5])
def test_gradient_is_that_of_plain_autograd(steps):
    denoiser, noise = toy.mixture(), toy.noise()
    mine, plain = new(scale=0.05), new(scale=0.05)
    tableau = mine.at(steps).tableau(denoiser.prediction)
    rollout(denoiser, noise, tableau, memory=MemoryPolicy(checkpoint_every=1)).square().sum().backward()
    plain_rollout(denoiser, noise, plain.at(steps).tableau(denoiser.prediction)).square().sum().backward()
    for name in TABLES:
        assert relative(getattr(mine, name).grad, getattr(plain, name).grad) < 1e-9, name
        assert getattr(mine, name).grad.abs().sum() > 0


def test_files_give_the_solver_back_and_solvers_of_one_k(tmp_path):
    solver = new(scale=0.05, degree=3)
    metrics = {"by_steps": {str(k): {"l1": k / 100} for k in RANGE}}
    save_solver(solver, tmp_path / "any.safetensors", model="mixture", metrics=metrics)
    write_readable(solver, tmp_path / "any.json", model="mixture")
    for name in ("any.safetensors", "any.json"):
        found = load_solver(tmp_path / name)
        assert found.config() == solver.config() and found.steps_range == RANGE and found.facts["model"] == "mixture"
        assert all(torch.equal(found.at(k).tableau().A, solver.at(k).tableau().A) for k in RANGE)
    follows = json.loads((tmp_path / "any.json").read_text())["follows from the parameters"]
    assert [len(follows[str(k)]["times"]) for k in RANGE] == [k + 1 for k in RANGE]

    for name in ("one.safetensors", "one.json"):
        kind = name.rpartition(".")[2]
        convert.main([str(tmp_path / "any.safetensors"), "--to", kind, "--steps", "4", "--out", str(tmp_path / name)])
        one = load_solver(tmp_path / name)
        assert isinstance(one, GeneralizedSolver) and one.steps == 4 and one.facts["metrics"] == {"l1": 0.04}
        assert "degree" not in one.facts
        assert all(torch.equal(value, tables(solver.at(4))[table]) for table, value in tables(one).items())
    assert [one.steps for one in opened(tmp_path / "any.safetensors")] == [*RANGE]


def trainer(optimizer="soap", iterations=8):
    denoiser = toy.mixture()
    targets = teacher_samples(denoiser, range(32), TeacherSolver())
    recipe = replace(RECIPES["quick"].over(len(RANGE)), iterations=iterations, batch=8, optimizer=optimizer)
    return Trainer(denoiser, new(), list(range(32)), targets, distillation_loss("l1"), recipe, Execution())


def distances(trainer):
    """L1 to the teacher at each K, on seeds that are not trained on."""
    seeds, denoiser = range(100, 116), trainer.denoiser
    teacher, noise = teacher_samples(denoiser, seeds, TeacherSolver()), seeded(denoiser, list(seeds))[0]
    with torch.no_grad():
        samples = [rollout(denoiser, noise, one.tableau(denoiser.prediction)) for one in trainer.average.each()]
    return [float((x - teacher).abs().mean()) for x in samples]


def test_every_k_takes_its_turn_and_comes_nearer_to_the_teacher():
    run = trainer(iterations=60)
    turns = [run.steps(step) for step in range(60)]
    assert all(sorted(turns[i : i + 4]) == [*RANGE] for i in range(0, 60, 4)) and turns[:4] != turns[4:8]
    assert turns == [trainer().steps(step) for step in range(60)]
    before = distances(run)
    for _ in run:
        pass
    assert all(after < 0.8 * first for after, first in zip(distances(run), before, strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_state_goes_on_bit_for_bit(tmp_path, optimizer):
    whole, first, second = trainer(optimizer), trainer(optimizer), trainer(optimizer)
    for run, end in ((whole, 8), (first, 3)):
        while run.step < end:
            run.update()
    directory = RunDirectory(tmp_path)
    directory.save(first.step, *first.state())
    second.load(*directory.restore())
    while not second.finished:
        second.update()
    assert all(torch.equal(value, second.state()[0][key]) for key, value in whole.state()[0].items())


def test_moments_and_rate_of_adam_reach_over_cycles():
    """Of one K nothing changes; of four, what was forgotten in an update is forgotten in a cycle."""
    adam = replace(RECIPES["quick"], optimizer="adam")
    one, four = (adam.over(cycle) for cycle in (1, 4))
    assert one == adam and (four.iterations, four.rate) == (3200, 5e-3) and four.ema**4 == pytest.approx(0.99)
    parameter = [torch.nn.Parameter(torch.zeros(2))]
    (group,), (long,) = one.optimizer_of(parameter).param_groups, one.optimizer_of(parameter, 4).param_groups
    assert group["betas"] == (0.9, 0.999) and [beta**4 for beta in long["betas"]] == pytest.approx([0.9, 0.999])


def test_soap_in_turns_is_soap_of_each_alone_where_each_has_a_subspace_of_its_own():
    """Two noisy quadratics of rotated halves of one vector, against two vectors of their own."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0].split(6)
    scales = torch.logspace(-1, 1, 6, dtype=torch.float64)
    shared = torch.nn.Parameter(torch.zeros(12, dtype=torch.float64))
    alone = [torch.nn.Parameter(torch.zeros(6, dtype=torch.float64)) for _ in wide]
    recipe = RECIPES["quick"].over(2)
    assert recipe.rate == RECIPES["quick"].rate
    together, each = recipe.optimizer_of([shared], 2), [recipe.optimizer_of([p]) for p in alone]
    for step in range(80):
        turn = step % 2
        goal = 1 + 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
        for optimizer, table in ((together, wide[turn] @ shared), (each[turn], alone[turn] * 1.0)):
            optimizer.zero_grad()
            (scales * (table - goal).square()).sum().backward()
            optimizer.param_groups[0]["turn"] = turn
            optimizer.step()
    for rows, wanted in zip(wide, alone, strict=True):
        assert torch.allclose((rows @ shared).detach(), wanted.detach(), rtol=0, atol=2e-5)


def test_a_run_ends_with_a_row_for_every_k_and_resumes(small, no_pictures, tmp_path, capsys):
    out = tmp_path / "run"
    few = ["--steps", "2-4", "--iterations", "6", "--save-every", "3", "--evaluate-every", "3", "--log-every", "3"]
    train.main(brief(out, *few))
    solver, table = (out / "solver.safetensors").read_bytes(), (out / "comparison.csv").read_text()
    for path in (out / "checkpoints" / "step-000006").iterdir():
        path.unlink()
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
    assert (out / "solver.safetensors").read_bytes() == solver and (out / "comparison.csv").read_text() == table
    rows = [row["setting"] for row in csv.DictReader(table.splitlines()) if row["solver"] == "learned (gs)"]
    assert rows == [f"K = {k}, 6 updates" for k in (2, 3, 4)]
    lengths = [len(json.loads(line)["told"]) for line in (out / "history.jsonl").read_text().splitlines()]
    assert lengths == 3 * [2, 3, 4] and (out / "report.html").exists()
    assert load_solver(out / "solver.safetensors").facts["metrics"]["by_steps"].keys() == {"2", "3", "4"}

    options = ["--model", "toy:make", "--seeds", "0-1", "--format", "npy", "--out", str(out), "--device", "cpu"]
    options += ["--solver", str(out / "solver.safetensors")]
    drawn = []
    for k in ("2", "4"):
        sample.main([*options, "--steps", k])
        drawn.append(np.load(out / "samples.npy"))
    assert not np.array_equal(*drawn)
    for more, said in (([], "a solver of 2 to 4 steps; say which with --steps"), (["--steps", "5"], "but --steps 5")):
        with pytest.raises(SystemExit):
            sample.main([*options, *more])
        assert said in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        convert.main([str(out), "--to", "hub", "--out", str(tmp_path / "card")])
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "4-"], "--steps must be a number"),
        (["--steps", "6-4"], "--steps must be a number"),
        (["--steps", "4-40"], "within 2 to 32"),
        (["--steps", "1-3"], "within 2 to 32"),
        (["--steps", "2-3", "--student", "belm"], "is of --student gs"),
        (["--steps", "2-3", "--order", "2"], "without --order"),
        (["--steps", "2-3", "--degree", "13"], "between 0 and 12"),
        (["--steps", "2", "--degree", "3"], "is of a range of K"),
        (["--steps", "2-3", "--start-grid", "times.json"], "the times of one K"),
    ],
)
def test_bad_options_are_refused(small, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        train.main(brief(tmp_path / "run", *options))
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("options", [{"degree": -1}, {"degree": 13}])
def test_bad_polynomials_are_refused(options):
    with pytest.raises(ValueError, match="degree must be between 0 and 12"):
        new(**options)
    with pytest.raises(ValueError, match="2 to 5 steps, but --steps 6"):
        new().at(6)
