"""Failure signatures: each speaks on a case made for it, once until it clears, and not on healthy ones."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from gas_engine import Schedule
from gas_engine.metrics import embedded_features, real_digits
from gas_engine.solvers.generalized import GeneralizedSolver
from gas_engine.solvers.grids import GRIDS, grid, noise_levels
from gas_engine.watch import MEDIAN, Watch

EDM = Schedule.edm()
KNOBS = (
    "--adversarial-weight", "--discriminator-rate", "--gamma", "--warm-up", "--start-grid", "--rate",
)  # fmt: skip


def levels(*ratios):
    """Times at these noise ratios between the ends of the schedule."""
    ends = torch.exp(-EDM.lam(torch.tensor([1.0, 1e-3])))
    return noise_levels(EDM, torch.tensor([float(ends[0]), *ratios, float(ends[1])]))


def one(sentences, *words):
    (sentence,) = sentences
    assert "\n" not in sentence and any(knob in sentence for knob in KNOBS), sentence
    for word in words:
        assert word in sentence, sentence


# Times


@pytest.mark.parametrize("schedule", [EDM, Schedule.vp_linear(), Schedule.flow(), Schedule.flow(3.0)])
@pytest.mark.parametrize("steps", [1, 2, 4, 6, 8, 10])
def test_no_grid_is_clustered(schedule, steps):
    for name in GRIDS:
        times = grid(name, schedule, steps)
        assert Watch(times).times(times, schedule) == [], name
        if name in ("uniform", "quadratic"):
            start = grid("quadratic", schedule, steps)
            assert Watch(start).times(times, schedule) == [], name


def test_times_clustered_at_high_noise():
    watch = Watch(levels(4.9, 0.95, 0.2))
    assert watch.times(levels(4.9, 0.95, 0.2), EDM) == []
    assert watch.times(levels(20, 0.95, 0.2), EDM) == []  # one of three
    one(watch.times(levels(30, 9, 0.2), EDM), "2 of 3", "ratio of 5", "at the start 0", "--start-grid")
    assert watch.times(levels(30, 9, 0.2), EDM) == []  # it has been said
    assert watch.times(levels(30, 4.5, 0.2), EDM) == []  # not clear yet
    assert watch.times(levels(30, 9, 0.2), EDM) == []
    assert watch.times(levels(30, 3, 0.2), EDM) == []  # clear
    one(watch.times(levels(30, 9, 0.2), EDM), "2 of 3")


def test_a_start_grid_at_high_noise_is_ones_own_choice():
    watch = Watch()
    assert watch.times(levels(30, 9, 0.2), EDM) == []
    one(watch.times(levels(30, 9, 7), EDM), "3 of 3", "at the start 2")


def test_times_at_one_noise_level():
    watch = Watch(levels(4.9, 0.95, 0.2))
    one(watch.times(levels(4.9, 0.21, 0.2), EDM), "times 2 and 3", "0.0")
    assert watch.times(levels(4.9, 0.22, 0.2), EDM) == []
    assert watch.times(levels(4.9, 0.95, 0.2), EDM) == []
    one(watch.times(levels(4.9, 0.21, 0.2), EDM), "times 2 and 3")


# Losses


def falling(step):
    """A loss as training has it: falls by an order, with batches that differ by a third."""
    return (0.1 + 0.9 * 0.98**step) * (1 + 0.33 * (-1) ** step)


def test_healthy_losses():
    watch = Watch()
    assert [s for step in range(300) for s in watch.losses(step, falling(step), 0.69 + 0.2 * (-1) ** step)] == []


@pytest.mark.parametrize(("which", "knob"), [("distillation", "--adversarial-weight"), ("adversarial", "--gamma")])
def test_loss_spikes(which, knob):
    watch, usual = Watch(), {"distillation": 0.1, "adversarial": 0.7}
    for step in range(40):
        assert watch.losses(step, **usual) == []
    spiked = {**usual, which: 4 * usual[which]}
    one(watch.losses(40, **spiked), "update 40", which, "4.0 times", "overpower", knob)
    assert watch.losses(41, **spiked) == []
    assert watch.losses(42, **{**usual, which: 2 * usual[which]}) == []  # not clear yet
    assert watch.losses(43, **spiked) == []
    assert watch.losses(44, **usual) == []
    one(watch.losses(45, **spiked), "update 45")


def test_without_an_adversary_nobody_is_blamed():
    watch = Watch()
    for step in range(20):
        watch.losses(step, 0.1)
    (sentence,) = watch.losses(20, 1.0)
    assert "discriminator" not in sentence and "adversarial" not in sentence and "--rate" in sentence


def test_early_and_broken_losses_say_nothing():
    watch = Watch()
    assert watch.losses(0, 0.1, 0.7) == [] and watch.losses(1, 10.0, 70.0) == []
    for step in range(50):
        assert watch.losses(step, float("nan"), float("inf")) == []
    assert len(watch.state()["losses"]["distillation"]) == 2


# Logits


def test_healthy_logits():
    generator = torch.Generator().manual_seed(0)
    watch = Watch()
    for _ in range(50):
        assert watch.logits(1 + 2 * torch.randn(24, generator=generator)) == []


def test_saturated_logits():
    watch = Watch()
    assert watch.logits(torch.zeros(8)) == []
    assert watch.logits(torch.full((8,), 6.0)) == []  # one reading is none
    said = [s for _ in range(5) for s in watch.logits(torch.full((8,), 6.0))]
    one(said, "sure of 51%", "--discriminator-rate")
    assert [s for _ in range(9) for s in watch.logits(torch.zeros(8))] == []
    one([s for _ in range(9) for s in watch.logits(torch.full((8,), 6.0))], "sure of")


def test_logits_far_from_zero():
    watch = Watch()
    one(watch.logits(torch.tensor([-12.0, 3.0, -20.0])), "11.7", "--gamma")
    assert watch.logits(torch.full((3,), -9.0)) == []
    assert watch.logits(torch.full((3,), float("nan"))) == [] and watch.logits(torch.zeros(0)) == []


# Samples


def test_blur():
    teacher = real_digits()[:128]
    watch, blurred = Watch(), F.avg_pool2d(teacher, 3, 1, 1, count_include_pad=False)
    slightly = 0.05 * blurred + 0.95 * teacher
    assert watch.samples(teacher, teacher) == [] and watch.samples(slightly, teacher) == []
    said = watch.samples(0.2 * blurred + 0.8 * teacher, teacher)
    one(said, "blurred", "raise --adversarial-weight")
    assert watch.samples(0.2 * blurred + 0.8 * teacher, teacher) == []


@pytest.mark.parametrize("features", [None, embedded_features("digits")])
def test_lost_diversity(features):
    """Every second sample a copy of one of eight: sharp, and fewer."""
    teacher = real_digits()[:128]
    student = teacher.clone()
    student[::2] = teacher[1]
    watch = Watch()
    assert watch.samples(teacher.flip(3), teacher, None) == []
    one(watch.samples(student, teacher, features), "diversity", "lower --adversarial-weight")
    assert watch.samples(teacher, teacher, features) == []
    one(watch.samples(student, teacher, features), "diversity")


def test_samples_that_tell_nothing():
    watch = Watch()
    assert watch.samples(torch.zeros(64, 1, 8, 8), torch.zeros(64, 1, 8, 8)) == []
    assert watch.samples(torch.zeros(8, 1, 8, 8), torch.randn(8, 1, 8, 8)) == []
    assert watch.samples(torch.zeros(64, 2), torch.randn(64, 2)) == []
    assert watch.samples(torch.full((64, 1, 8, 8), torch.nan), torch.randn(64, 1, 8, 8)) == []


# State


def feed(watch, steps):
    generator = torch.Generator().manual_seed(1)
    said = []
    for step in range(60):
        loss = falling(step) * (5 if step in (30, 41) else 1)
        logits = 6 * torch.rand(4, generator=generator) + step / 10
        if step in steps:
            said += watch.losses(step, loss, 0.7) + watch.logits(logits)
            said += watch.times(levels(30, 9 if step % 20 > 5 else 1, 0.2), EDM)
    return said


@pytest.mark.parametrize("cut", [5, 33, 45])
def test_state_goes_through_json(cut):
    whole, first, second = Watch(levels(4.9, 0.95, 0.2)), Watch(levels(4.9, 0.95, 0.2)), Watch()
    wanted = feed(whole, range(60))
    said = feed(first, range(cut))
    second.load(json.loads(json.dumps(first.state())))
    assert said + feed(second, range(cut, 60)) == wanted and len(wanted) >= 5
    assert second.state() == whole.state()
    assert len(whole.state()["losses"]["distillation"]) <= MEDIAN


def test_watching_changes_nothing():
    """No random number drawn, no gradient or parameter touched."""
    solver = GeneralizedSolver(4, EDM)
    before, generator = [p.clone() for p in solver.parameters()], torch.get_rng_state()
    watch = Watch(solver.times())
    watch.times(solver.times(), EDM)
    watch.samples(torch.randn(16, 1, 8, 8, generator=torch.Generator()).requires_grad_(), torch.zeros(16, 1, 8, 8))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(solver.parameters(), before, strict=True))
