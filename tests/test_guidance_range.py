"""One solver for a range of guidance scales: its polynomials, theory, gradient, turns and files, and a run."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy
from runs import HERE, brief
from test_conditioning import conditional
from twin import plain_rollout, relative

from gas_engine import (
    Denoiser,
    GeneralizedSolver,
    MemoryPolicy,
    comparison,
    convert,
    evaluate,
    load_solver,
    rollout,
    sample,
    save_solver,
    train,
)  # fmt: skip
from gas_engine._cli import InputError
from gas_engine.conditioning import SCALES, nodes, scale_of
from gas_engine.denoiser import seeded
from gas_engine.execution import Execution
from gas_engine.export.numbers import for_sigma_space, opened
from gas_engine.guidance import guided
from gas_engine.losses import distillation_loss
from gas_engine.solvers import AnyStepsSolver
from gas_engine.solvers.any_steps import TABLES
from gas_engine.teacher import TeacherSolver, teacher_samples
from gas_engine.training import students
from gas_engine.training.directory import RunDirectory
from gas_engine.training.options import Config
from gas_engine.training.recipe import RECIPES
from gas_engine.training.trainer import Trainer

RANGE = (2.0, 9.0)
EVERY = nodes(RANGE)


@pytest.fixture(autouse=True)
def beside_the_toy_model(monkeypatch):
    monkeypatch.chdir(HERE)


def new(steps=range(3, 4), noise=0.0, **options):
    """A solver, its numbers drawn."""
    solver = AnyStepsSolver(steps, toy.mixture().schedule, start="quadratic", guidance=RANGE, **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in solver.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def ranged() -> Denoiser:
    return guided(conditional(), RANGE, conditional().conditioning.null)


@pytest.mark.parametrize("scale", [*RANGE, 4.2])
def test_zero_is_theory_at_every_scale(scale):
    """To the bit the Generalized Solver's start, which is DPM-Solver++(3M)."""
    found, alone = new().at(guidance=scale), GeneralizedSolver(3, toy.mixture().schedule, start="quadratic")
    for prediction in ("data", "noise"):
        mine, other = found.tableau(prediction), alone.tableau(prediction)
        assert all(torch.equal(getattr(mine, name), getattr(other, name)) for name in ("A", "B", "t_net"))
    assert found.config() == alone.config() and found.facts["guidance"] == scale


@pytest.mark.parametrize(("scales", "scale"), [(2, 3.0), (3, 2.0), (3, 9.0), (3, 4.2), (6, 6.1)])
def test_tables_are_polynomials_in_the_logarithm_of_the_scale(scales, scale):
    """Through those of the scales that they are learned at, fitted by NumPy."""
    solver = new(noise=0.05, scales=scales)
    points = np.log1p(nodes(RANGE, scales))
    constant = AnyStepsSolver(range(3, 4), solver.schedule, start="quadratic")
    for name in TABLES:
        fitted = np.polynomial.polynomial.polyfit(points, getattr(solver, name).detach().numpy().T, scales - 1)
        getattr(constant, name).data = torch.from_numpy(np.polynomial.polynomial.polyval(np.log1p(scale), fitted))
        wanted = getattr(constant.at(3), name)
        assert torch.allclose(getattr(solver.at(guidance=scale), name), wanted, rtol=0, atol=1e-10)


def test_at_its_own_scales_tables_are_free():
    solver = new()
    for j, scale in enumerate(nodes(RANGE)):
        assert solver._shares(scale).tolist() == [float(i == j) for i in range(SCALES)]


@pytest.mark.parametrize("scale", [2.0, 5.5])
def test_gradient_is_that_of_guidance_written_out(scale):
    """F_0 + g (F_c - F_0) and the tables at g, by ordinary autograd in float64."""
    base = conditional()
    noise, classes = toy.noise(), torch.tensor([3, 7])

    def written_out(x, t, _):
        nothing = base(x, t, torch.full_like(classes, 10))
        return nothing + scale * (base(x, t, classes) - nothing)

    plain, mine = new(noise=0.05), new(noise=0.05)
    tableau = plain.at(guidance=scale).tableau()
    plain_rollout(Denoiser(written_out, base.schedule, "data", toy.SHAPE), noise, tableau).square().sum().backward()
    tableau = mine.at(guidance=scale).tableau()
    denoiser = guided(base, scale, base.conditioning.null)
    rollout(denoiser, noise, tableau, classes, MemoryPolicy(checkpoint_every=1)).square().sum().backward()
    for name in TABLES:
        assert relative(getattr(mine, name).grad, getattr(plain, name).grad) < 1e-9, name
        moved = (getattr(mine, name).grad.abs().sum(0) > 0).tolist()
        assert moved == ([True, False, False] if scale == RANGE[0] else [True, True, True])


def test_gradients_lie_in_the_span_of_their_turn():
    solver = new(range(2, 5), noise=0.05)
    for k, scale in ((2, 2.0), (4, 5.5)):
        solver.zero_grad()
        tableau = solver.at(k, scale).tableau()
        (tableau.A.sin().sum() + tableau.B.cos().sum() + tableau.t_net.sin().sum()).backward()
        gradient, span = torch.cat([p.grad.flatten() for p in solver.parameters()]), solver.span(k, scale)
        assert torch.allclose(span.T @ span, torch.eye(span.shape[1], dtype=torch.float64), atol=1e-12)
        assert relative(span @ (span.T @ gradient), gradient) < 1e-12 and span.shape[1] == k * (k + 1) + 2 * k - 1


def test_soap_takes_the_same_steps_within_a_span():
    generator = torch.Generator().manual_seed(0)
    wide = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=torch.float64))[0]
    vectors = [torch.nn.Parameter(torch.zeros(9, dtype=torch.float64)) for _ in range(2)]
    optimizers = [RECIPES["quick"].optimizer_of([vector]) for vector in vectors]
    optimizers[1].param_groups[0]["span"] = wide
    for _ in range(40):
        goal = 1 + 0.3 * torch.randn(4, generator=generator, dtype=torch.float64)
        for vector, optimizer in zip(vectors, optimizers, strict=True):
            optimizer.zero_grad()
            (wide.T @ vector - goal).square().mul(torch.logspace(-1, 1, 4)).sum().backward()
            optimizer.step()
    assert torch.allclose(*vectors, rtol=0, atol=1e-5) and vectors[0].abs().sum() > 0.1


def test_three_seeds_in_a_row_have_three_scales():
    assert [2.0, pytest.approx(math.sqrt(3 * 10) - 1), 9.0] == EVERY and len(EVERY) == SCALES
    four = np.log1p(nodes(RANGE, 4))
    assert (four - four[0]) / (four[-1] - four[0]) == pytest.approx([0, 0.25, 0.75, 1])
    blocks = [[scale_of(RANGE, 3 * n + i) for i in range(3)] for n in range(40)]
    assert all(sorted(block) == EVERY for block in blocks) and len({*map(tuple, blocks)}) == 6
    assert scale_of(3.5, 11) == 3.5
    denoiser = ranged()
    told = seeded(denoiser, range(11, 14))[1]["guidance"]
    assert told.tolist() == pytest.approx([scale_of(RANGE, seed) for seed in range(11, 14)])


def trainer(optimizer="soap", steps=range(2, 4), iterations=40, **options):
    denoiser, seeds = ranged(), list(range(48))
    targets = teacher_samples(denoiser, seeds, TeacherSolver())
    recipe = RECIPES["quick"].over(len(steps) * SCALES)
    recipe = replace(recipe, iterations=iterations, batch=16, optimizer=optimizer)
    loss = distillation_loss("l1")
    return Trainer(denoiser, new(steps, **options), seeds, targets, loss, recipe, Execution())


def test_every_k_and_scale_take_their_turn_with_a_batch_of_that_scale():
    run = trainer()
    turns = [run.turns.at(step) for step in range(24)]
    assert len(run.turns) == 6 and sorted(run.turns.rows) == EVERY
    for cycle in range(4):
        own = [(turn.steps, turn.guidance) for turn in turns[6 * cycle : 6 * cycle + 6]]
        assert sorted(own) == sorted((k, g) for k in (2, 3) for g in EVERY)
    for scale in EVERY:
        steps = [step for step, turn in enumerate(turns) if turn.guidance == scale]
        assert [turns[step].visit for step in steps] == list(range(8))
        for step in steps:  # as many rows of each scale as a batch has: every batch is an epoch
            assert sorted(run.batches.rows(step)) == [n for n in range(48) if scale_of(RANGE, n) == scale]
            assert run.batches.at(step).cond["guidance"].tolist() == pytest.approx(16 * [scale])
        assert len({tuple(run.batches.rows(step)) for step in steps}) == 8
    assert turns == [trainer().turns.at(step) for step in range(24)]


def far(run):
    """L1 to the teacher of each scale, on seeds that are not trained on."""
    seeds = range(104, 136)
    teacher = teacher_samples(run.denoiser, seeds, TeacherSolver())
    data = comparison.Samples.of(run.denoiser, seeds, teacher, torch.device("cpu"))
    solver = comparison.solver_for(run.average, 3, run.denoiser)
    with torch.no_grad():
        error = (data.run(run.denoiser, solver, slice(0, 32)) - teacher).abs().flatten(1).mean(1)
    return [float(error[[n for n, g in enumerate(data.scales) if g == scale]].mean()) for scale in EVERY]


def test_scales_come_nearer_to_their_teachers():
    run = trainer(steps=range(3, 4), iterations=240)
    before = far(run)
    for _ in run:
        pass
    assert sum(far(run)) < 0.8 * sum(before)


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_state_goes_on_bit_for_bit(tmp_path, optimizer):
    whole, first, second = trainer(optimizer), trainer(optimizer), trainer(optimizer)
    for run, end in ((whole, 40), (first, 21)):
        while run.step < end:
            run.update()
    directory = RunDirectory(tmp_path)
    directory.save(first.step, *first.state())
    second.load(*directory.restore())
    while not second.finished:
        second.update()
    assert all(torch.equal(value, second.state()[0][key]) for key, value in whole.state()[0].items())


def test_samples_of_many_scales_are_those_of_each():
    denoiser, solver = ranged(), new(noise=0.05)
    noise, cond = seeded(denoiser, range(12))
    data = comparison.Samples.of(denoiser, range(12), torch.zeros(12, *toy.SHAPE), torch.device("cpu"))
    with torch.no_grad():
        found = data.run(denoiser, comparison.solver_for(solver, 3, denoiser), slice(3, 12))
        for n in range(3, 12):
            own = guided(conditional(), scale_of(RANGE, n), conditional().conditioning.null)
            tableau = solver.at(guidance=scale_of(RANGE, n)).tableau()
            alone = rollout(own, noise[n : n + 1], tableau, cond["cond"][n : n + 1])
            assert torch.allclose(found[n - 3], alone[0], atol=1e-5)


def test_files_say_their_range_and_give_the_solver_back(tmp_path):
    solver = new(range(2, 4), noise=0.05, scales=4)
    save_solver(solver, tmp_path / "range.safetensors", model="conditional", guidance=RANGE)
    convert.main([str(tmp_path / "range.safetensors"), "--to", "json", "--out", str(tmp_path / "range.json")])
    for name in ("range.safetensors", "range.json"):
        found = load_solver(tmp_path / name, guidance=5.0)
        assert found.config() == solver.config() and found.guidance_range == RANGE and found.scales == 4
        assert all(torch.equal(found.at(k, 4.2).tableau().A, solver.at(k, 4.2).tableau().A) for k in (2, 3))
    one = tmp_path / "one.safetensors"
    words = [str(tmp_path / "range.safetensors"), "--steps", "3", "--guidance", "4.2", "--out", str(one)]
    convert.main(words)
    found = load_solver(one)
    assert isinstance(found, GeneralizedSolver) and found.facts["guidance"] == 4.2 and "degree" not in found.facts
    assert torch.equal(found.tableau().B, solver.at(3, 4.2).tableau().B)
    numbers = for_sigma_space([solver.at(k, 4.2) for k in (2, 3)])
    assert [*numbers["solvers"]] == ["2", "3"]
    with pytest.raises(ValueError, match="guidance 2 to 9; say which"):
        opened(solver)


def test_a_file_that_only_was_trained_over_a_range_is_the_same_at_every_scale(tmp_path):
    """As those of several K were before tables could be functions of the scale."""
    solver = AnyStepsSolver(range(2, 4), toy.mixture().schedule)
    save_solver(solver, tmp_path / "old.safetensors", guidance=[2.0, 9.0])
    found = load_solver(tmp_path / "old.safetensors")
    assert found.guidance_range is None and found.theta.ndim == 1 and found.at(3, 100.0).steps == 3


def test_no_fact_takes_the_place_of_what_rebuilds_a_solver(tmp_path):
    save_solver(new(), tmp_path / "range.safetensors", guidance=5.0)
    assert load_solver(tmp_path / "range.safetensors").guidance_range == RANGE


def test_a_run_does_not_begin_with_a_solver_of_another_kind(tmp_path):
    constant = AnyStepsSolver(range(2, 4), toy.mixture().schedule, start="quadratic")
    save_solver(new(range(2, 4)), tmp_path / "range.safetensors")
    config = Config(start_from=tmp_path / "range.safetensors")
    with pytest.raises(InputError, match=r"with guidance=\[2.0, 9.0\], and the run is to have None"):
        students._begun(config, conditional(), constant)


def test_a_scale_without_seeds_is_refused():
    with pytest.raises(ValueError, match="the 2 training seeds have 2 of the 3 scales of guidance"):
        Trainer(
            ranged(), new(), [0, 1], torch.zeros(2, *toy.SHAPE), distillation_loss("l1"), RECIPES["quick"], Execution()
        )


def test_one_file_is_of_one_k(tmp_path, capsys):
    save_solver(new(range(2, 4)), tmp_path / "range.safetensors")
    with pytest.raises(SystemExit) as stop:
        convert.main(
            [str(tmp_path / "range.safetensors"), "--guidance", "4", "--out", str(tmp_path / "one.safetensors")]
        )
    assert stop.value.code == 2 and "--steps" in capsys.readouterr().err


def words(out, *more):
    return ["test_conditioning:make" if word == "toy:make" else word for word in brief(out, *more)]


def test_a_run_of_a_range_is_used_at_a_scale_and_resumes(small, no_pictures, tmp_path, capsys):
    out = tmp_path / "run"
    few = ["--iterations", "12", "--save-every", "6", "--evaluate-every", "6", "--log-every", "6", "--guidance", "2:9"]
    train.main(words(out, *few))
    assert "--guidance 4.47723 --solver" in " ".join(capsys.readouterr().out.split())
    file, table = out / "solver.safetensors", (out / "comparison.csv").read_text()
    written, best = file.read_bytes(), (out / "best.safetensors").read_bytes()
    for path in (out / "checkpoints" / "step-000012").iterdir():
        path.unlink()
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
    assert file.read_bytes() == written and (out / "comparison.csv").read_text() == table
    assert (out / "best.safetensors").read_bytes() == best and (out / "report.html").exists()
    assert load_solver(file).guidance_range == RANGE and load_solver(file).scales == SCALES

    same = ["--same-at-every-scale", "--compare", str(file), "--iterations", "2"]
    train.main(words(tmp_path / "same", *few, *same))  # with the same teacher set
    rows = [row["solver"] for row in csv.DictReader((tmp_path / "same" / "comparison.csv").open())]
    assert rows[:2] == ["learned (gs)", "run"] and isinstance(
        load_solver(tmp_path / "same" / "solver.safetensors"), GeneralizedSolver
    )

    options = ["--model", "test_conditioning:make", "--solver", str(file), "--device", "cpu"]
    options += ["--out", str(tmp_path / "used")]
    drawn = []
    for scale in (2.0, 6.5):
        sample.main([*options, "--seeds", "0-1", "--format", "npy", "--guidance", str(scale)])
        drawn.append(np.load(tmp_path / "used" / "samples.npy"))
        denoiser = guided(conditional(), scale, conditional().conditioning.null)
        noise, cond = seeded(denoiser, [0, 1])
        tableau = load_solver(file).at(guidance=scale).tableau()
        with torch.no_grad():
            assert np.array_equal(rollout(denoiser, noise, tableau, cond), drawn[-1])
    assert not np.array_equal(*drawn)
    measured = ["--seeds", "100-107", "--metrics", "l1", "--guidance", "6.5"]
    evaluate.main([*options, *measured])
    (row, _) = csv.DictReader((tmp_path / "used" / "evaluation.csv").open())
    assert row["setting"] == "any, guidance 2 to 9" and float(row["l1"]) > 0

    sampled, wanted = [sample.main, *options, "--seeds", "0"], "a solver for guidance 2 to 9"
    refused = [
        (sampled, f"{wanted}; say which with --guidance"),
        ([*sampled, "--guidance", "3:4"], f"{wanted}; say which with --guidance"),
        ([*sampled, "--guidance", "9.5"], f"{wanted}, but --guidance 9.5 was given"),
        ([evaluate.main, *options, *measured[:-1], "1.5"], f"{wanted}, but --guidance 1.5 was given"),
        ([convert.main, str(file), "--to", "comfyui", "--out", str(tmp_path / "c")], f"{wanted}; say which"),
        ([convert.main, str(file), "--guidance", "1", "--out", str(tmp_path / "c")], wanted),
        ([convert.main, str(out), "--to", "hub", "--out", str(tmp_path / "c")], "convert --guidance"),
        ([convert.main, str(tmp_path / "same" / "solver.safetensors"), "--guidance", "3"], "a solver for one guidance"),
    ]  # fmt: skip
    for (verb, *said), sentence in refused:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            verb(said)
        assert stop.value.code == 2 and sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--same-at-every-scale"], "is of a range, such as --guidance 2:9"),
        (["--guidance", "3", "--same-at-every-scale"], "is of a range, such as --guidance 2:9"),
        (["--guidance", "2:9", "--degree", "2"], "is of a range of K"),
        (["--guidance", "2:9", "--start-grid", "times.json"], "the times of one scale"),
    ],
)
def test_bad_options_are_refused(small, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        train.main(words(tmp_path / "run", *options))
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_other_students_are_the_same_at_every_scale(small, no_pictures, tmp_path):
    train.main(words(tmp_path / "run", "--guidance", "2:9", "--student", "ld3", "--iterations", "2"))
    found = load_solver(tmp_path / "run" / "solver.safetensors")
    assert found.guidance_range is None and found.facts["guidance"] == [2.0, 9.0]


@pytest.mark.parametrize("scales", [(9.0, 2.0), (2.0, 2.0), (-1.0, 3.0), (2.0, math.inf)])
def test_bad_ranges_are_refused(scales):
    with pytest.raises(ValueError, match="a range of guidance must rise"):
        AnyStepsSolver(range(3, 4), toy.mixture().schedule, guidance=scales)
