"""What a model is told: classes, guidance by a scale or a range, and training with it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import toy
import tyro
import yaml
from hypothesis import given
from hypothesis import strategies as st
from runs import brief, flat_of, toy_trainer
from twin import plain_rollout, relative

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, Schedule, load_solver, rollout, sample, teacher, train
from gas_engine.conditioning import Classes, Conditioning, moved, nodes, take
from gas_engine.denoiser import seeded
from gas_engine.guidance import guided, parse_guidance
from gas_engine.models import ModelOptions, open_model
from gas_engine.solvers import save_solver
from gas_engine.solvers.grids import GITS, grid
from gas_engine.training import setup
from gas_engine.training.options import Config
from gas_engine.training.presets import with_preset

SCHEDULE = Schedule.vp_discrete(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0))


def conditional(null: int | None = 10, schedule: Schedule | None = None) -> Denoiser:
    plain = toy.mixture(schedule)
    return Denoiser(
        plain.function, plain.schedule, "data", toy.SHAPE, conditioning=Classes(10, null), name="conditional"
    )


def make() -> Denoiser:
    """``--model test_conditioning:make``: classes 0 to 9, of which 10 says nothing."""
    return conditional()


class Captions(Conditioning):
    """A dict of tensors for each seed."""

    def draw(self, seeds, generators):
        rows = torch.tensor([float(seed % 3) for seed in seeds])
        return {"text": rows[:, None].expand(-1, 4), "pooled": torch.ones(1, 2)}

    def facts(self):
        return {"prompts": "three"}


def test_classes_are_drawn_after_the_noise_of_a_seed():
    noise, cond = seeded(conditional(), range(6))
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(noise[seed], torch.randn(toy.SHAPE, generator=generator))
        assert cond[seed] == torch.randint(10, (), generator=generator)
    assert torch.equal(seeded(conditional(), [4])[1][0], cond[4]) and conditional().classes == 10
    assert seeded(conditional(), range(6), conditions=False)[1] is None


@given(low=st.floats(0, 20), width=st.floats(0.5, 20))
def test_scales_are_drawn_from_a_range_for_each_seed(low, width):
    denoiser = guided(conditional(), (low, low + width), conditional().conditioning.null)
    plain, cond = seeded(conditional(), range(8))[1], seeded(denoiser, range(8))[1]
    assert torch.equal(cond["cond"], plain)  # the classes do not depend on guidance
    assert cond["guidance"].shape == (8,)
    assert sorted(set(cond["guidance"].tolist())) == torch.tensor(nodes((low, low + width))).tolist()
    assert torch.equal(seeded(denoiser, [5])[1]["guidance"][0], cond["guidance"][5])


@pytest.mark.parametrize("scale", [1.0, 2.0, 7.5, (2.0, 9.0)])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("schedule", [Schedule.vp_linear(), SCHEDULE], ids=["linear", "discrete"])
def test_guided_gradients_equal_autograd(scale, split, schedule):
    """Against the formula F_0 + g (F_c - F_0), written out, by ordinary autograd in float64."""
    base = conditional(schedule=schedule)
    denoiser = guided(base, scale, base.conditioning.null)
    noise, cond = seeded(denoiser, range(3))
    noise = noise.double()
    solver = GeneralizedSolver(3, base.schedule, start="quadratic")
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    classes = cond["cond"] if isinstance(scale, tuple) else cond
    g = cond["guidance"].double()[:, None, None, None] if isinstance(scale, tuple) else scale

    def written_out(x, t, _):
        nothing = base(x, t, torch.full_like(classes, 10))
        return nothing + g * (base(x, t, classes) - nothing)

    grads = []
    for way in (written_out, None):
        solver.zero_grad()
        if way is None:
            x = rollout(denoiser, noise, solver.tableau(), cond, MemoryPolicy(split_guidance=split))
        else:
            x = plain_rollout(Denoiser(way, base.schedule, "data", toy.SHAPE), noise, solver.tableau())
        x.square().mean().backward()
        grads.append((x.detach(), torch.cat([p.grad.flatten() for p in solver.parameters()])))
    assert relative(grads[1][0], grads[0][0]) < 1e-6 and relative(grads[1][1], grads[0][1]) < 1e-6
    assert isinstance(scale, tuple) or relative(grads[1][1], grads[0][1]) < 1e-12


@pytest.mark.parametrize("said, meant", [("7.5", 7.5), ("2:9", (2.0, 9.0)), ("3:3", 3.0), ("0", 0.0)])
def test_guidance_as_it_is_said(said, meant):
    assert parse_guidance(said) == meant


@pytest.mark.parametrize("said", ["", "a", "9:2", "2:", "-1", "inf", "nan", "1:2:3"])
def test_what_is_no_guidance(said):
    with pytest.raises(ValueError, match=r"7\.5 or a range such as 2:9, got"):
        parse_guidance(said)


def test_models_that_cannot_be_guided_say_so():
    with pytest.raises(ValueError, match=r"digits was trained without one; leave it out"):
        open_model(ModelOptions(guidance="2"))
    with pytest.raises(ValueError, match="digits takes no text"):
        open_model(ModelOptions(prompts="a cat"))
    with pytest.raises(ValueError, match="has one of its own"):
        open_model(ModelOptions("toy:make", resolution=512))
    assert open_model(ModelOptions(guidance="1")).guidance == 1.0


def test_trees_of_conditions():
    cond = {"text": torch.arange(6.0).view(3, 2), "pooled": torch.ones(1, 2), "none": None}
    part = take(cond, slice(1, 2), 3)
    assert part["text"].tolist() == [[2.0, 3.0]] and part["pooled"].shape == (1, 2) and part["none"] is None
    assert moved(cond, "meta")["text"].device.type == "meta"
    with pytest.raises(ValueError, match="beside a batch of 5"):
        take(cond, slice(0, 2), 5)


def test_an_update_with_a_range_of_scales_is_the_gradient_written_out():
    base = conditional()
    denoiser = guided(base, (2.0, 9.0), base.conditioning.null)
    trainer = toy_trainer(denoiser, rate=1e-3)
    rows = trainer.batches.rows(0)
    trainer.update()
    noise, cond = seeded(denoiser, [trainer.batches.seeds[row] for row in rows])
    solver = GeneralizedSolver(3, base.schedule, start="quadratic")
    x = rollout(denoiser, noise, solver.tableau(), cond)
    (x.square().flatten(1).mean(1)).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in solver.parameters()])
    torch.nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
    got = torch.cat([p.grad.flatten() for p in trainer.solver.parameters()])
    clipped = torch.cat([p.grad.flatten() for p in solver.parameters()])
    assert relative(got, clipped) < 1e-9 and float(expected.norm()) > 0


def test_dicts_of_conditions_train_and_go_into_what_made_a_set(tmp_path):
    plain = toy.mixture()

    def function(x, t, cond):
        return plain(x, t) * (1 + 0.01 * cond["text"].mean(1).to(x.dtype)[:, None, None, None])

    denoiser = Denoiser(
        function, plain.schedule, "data", toy.SHAPE, network=plain, conditioning=Captions(), name="captions"
    )
    trainer = toy_trainer(denoiser)
    before = flat_of(trainer.solver)
    trainer.update()
    assert not torch.equal(before, flat_of(trainer.solver))
    made = teacher.TeacherSolver(steps=4)
    teacher.make_teacher_set(denoiser, [0, 1], made, tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["made_by"]["prompts"] == "three"
    denoiser.conditioning = None
    denoiser.function = lambda x, t, cond: plain(x, t)
    with pytest.raises(ValueError, match="another prompts"):
        teacher.make_teacher_set(denoiser, [0, 1], made, tmp_path)


def words(out, *more):
    said = brief(out, *more)
    return ["test_conditioning:make" if word == "toy:make" else word for word in said]


def test_training_with_guidance(small, no_pictures, tmp_path, capsys):
    train.main(words(tmp_path / "run", "--iterations", "3", "--guidance", "2:9", "--split-guidance"))
    facts = load_solver(tmp_path / "run" / "solver.safetensors").facts
    assert facts["guidance"] == [2.0, 9.0] and facts["model"] == "conditional"
    with pytest.raises(SystemExit):  # with the same teacher set
        train.main(words(tmp_path / "other", "--iterations", "3", "--guidance", "3"))
    assert "another guidance" in capsys.readouterr().err


def test_a_budget_plans_guided_updates(small, no_pictures, tmp_path):
    train.main(words(tmp_path / "run", "--iterations", "2", "--guidance", "2:9", "--memory-budget", "64MiB"))
    assert "split" in (tmp_path / "run" / "plan.csv").read_text()


CONFIG = """
title: A toy
reproduce: {FID: [1, 2]}
steps: 2
batch: 4
lean: true
guidance: 2.0
teacher: {solver: ddim, steps: 5}
by_steps: {3: {teacher: {steps: 7}, batch: 6}}
if_adversarial: {adversarial_weight: 0.5}
"""


def test_options_from_a_file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG)
    said = with_preset(["--config", str(path), "--no-lean", "--steps=3", "--adversarial"])
    found = tyro.cli(Config, args=said)
    assert (found.steps, found.batch, found.lean, found.guidance) == (3, 6, False, "2.0")
    assert (found.teacher.solver, found.teacher.steps, found.adversarial_weight) == ("ddim", 7, 0.5)
    assert said == with_preset([f"--config={path}", "--no-lean", "--steps=3", "--adversarial"])
    assert found.config == path and with_preset(["--steps", "4"]) == ["--steps", "4"]
    plain = tyro.cli(Config, args=with_preset(["--config", str(path)]))
    assert (plain.steps, plain.teacher.steps, plain.batch, plain.adversarial_weight) == (2, 5, 4, None)


@pytest.mark.parametrize(
    "content, said",
    [
        ("stepz: 3", "'stepz', which is no option"),
        ("- a", "got list"),
        ("a: [", "cannot read"),
        (None, "cannot read"),
        ("by_steps: [1]", "by_steps of"),
        ("steps: 3\nby_steps: {3: 7}", "by_steps: 3 of"),
    ],
)
def test_files_of_no_options(tmp_path, content, said, capsys):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(path)])
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_recipes_are_options_of_train(path):
    for steps in yaml.safe_load(path.read_text())["reproduce"]["K"]:
        for more in ([], ["--adversarial"]):
            found = tyro.cli(Config, args=with_preset(["--config", str(path), "--steps", str(steps), *more]))
            assert found.steps == steps and setup.recipe(found).iterations == found.iterations
            assert found.teacher.steps == steps + 1 or path.stem != "mscoco"
            assert found.teacher.tableau(SCHEDULE).steps == found.teacher.steps


def test_the_gits_grid_has_the_published_levels():
    for steps in (5, 6, 7, 8):
        alpha, sigma, _ = SCHEDULE(grid("gits", SCHEDULE, steps))
        assert relative(sigma / alpha, torch.tensor(GITS[steps], dtype=torch.float64)) < 1e-12
    with pytest.raises(ValueError, match="of 5, 6, 7, 8 steps, got 4"):
        grid("gits", SCHEDULE, 4)


def test_solvers_for_another_guidance_or_another_process(tmp_path):
    solver = GeneralizedSolver(3, SCHEDULE)
    path = tmp_path / "solver.safetensors"
    save_solver(solver, path, guidance=[2.0, 9.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (2.0, 7.5, (3.0, 9.0)):
            load_solver(path, guidance=scale)
    with pytest.warns(UserWarning, match=r"trained at guidance \[2.0, 9.0\] and is used at 1.0"):
        load_solver(path, guidance=1.0)
    flow = Denoiser(lambda x, t, c: x, Schedule.flow(3.0), "flow", (1, 4, 4), name="flow")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"and flow runs on Schedule\.flow"):
        sample._tableau(sample.Config(solver=str(path)), flow)
