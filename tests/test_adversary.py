"""A discriminator beside a solver: the iteration against one written out, its bytes, its state, its options."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from runs import flat_of
from twin import relative

from gas_engine import GeneralizedSolver, MemoryPolicy
from gas_engine.architectures import architecture
from gas_engine.execution import Execution
from gas_engine.losses import distillation_loss
from gas_engine.memory import ByteTracker
from gas_engine.networks import R3GANDiscriminator
from gas_engine.planner import plan
from gas_engine.training.adversary import FRESH, Adversarial, Adversary
from gas_engine.training.recipe import Recipe
from gas_engine.training.trainer import NotFinite, Trainer

STEPS, BATCH = 3, 4
SHAPE = (3, 16, 16)


def discriminator(seed: int = 0) -> R3GANDiscriminator:
    torch.manual_seed(seed)
    network = R3GANDiscriminator([16, 24, 32], [4, 4, 8], [1, 1, 1])
    with torch.no_grad():  # as initialised, the last convolution of a block is zero and so is half of the gradient
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def doubles(denoiser, seeds, **_):
    """Noise of these seeds in float64."""
    rows = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows), None


def trainer_of(denoiser, iterations=3, execution=None, network=None, weight=0.7, rate=1e-3, **settings) -> Trainer:
    solver = GeneralizedSolver(STEPS, denoiser.schedule, 1e-3, start="quadratic")
    recipe = Recipe(iterations, BATCH, 1e-2, "constant", ema=0.9, start_grid="")
    targets = torch.tanh(torch.randn(10, *SHAPE, generator=torch.Generator().manual_seed(5)))
    adversary = Adversary(network or discriminator(), Adversarial(weight, rate, **settings))
    loss, execution = distillation_loss("l1"), execution or Execution()
    return Trainer(denoiser, solver, list(range(10)), targets, loss, recipe, execution, adversary=adversary)


def sample(denoiser, x, tableau):
    """A rollout written out."""
    states, outputs = [x], []
    for n in range(tableau.steps):
        outputs.append(denoiser(states[n], tableau.t_net[n], None))
        states.append(sum(tableau.A[n, j] * states[j] + tableau.B[n, j] * outputs[j] for j in range(n + 1)))
    return states[-1]


@pytest.mark.parametrize(
    ("kind", "fakes"), [("relativistic", "fresh"), ("non_saturating", "fresh"), ("plain", "reuse")]
)
def test_iterations_are_those_written_out(tiny, monkeypatch, kind, fakes):
    """Parameters of solver and discriminator after three updates, in float64, by plain autograd through everything."""
    for module in ("batches", "trainer"):
        monkeypatch.setattr(f"gas_engine.training.{module}.seeded", doubles)
    denoiser, network = tiny(1e-3), discriminator().double()
    execution = Execution(MemoryPolicy(1), micro_batch=3)
    trainer = trainer_of(denoiser, execution=execution, network=network, kind=kind, fakes=fakes, gamma=0.3)
    trainer.batches.targets = trainer.batches.targets.double()

    solver = GeneralizedSolver(STEPS, denoiser.schedule, 1e-3, start="quadratic")
    D = discriminator().double()
    solver_optimizer = torch.optim.Adam(solver.parameters(), lr=1e-2)
    optimizer = torch.optim.Adam(D.parameters(), lr=1e-3)
    last = None
    for step in range(3):
        rows = trainer.batches.rows(step)
        real = trainer.batches.targets[rows]
        fresh = range(FRESH + BATCH * step, FRESH + BATCH * (step + 1))
        with torch.no_grad():
            fake, other = sample(denoiser, doubles(None, fresh)[0], solver.tableau("data")), real
        if fakes == "reuse" and last is not None:
            fake, other = last
        a, b = (x.detach().clone().requires_grad_() for x in (other, fake))
        p, q = D(a), D(b)
        penalty = sum(
            torch.autograd.grad(logits.sum(), x, create_graph=True)[0].square().flatten(1).sum(1)
            for logits, x in ((p, a), (q, b))
        )
        judged = F.softplus(q - p) if kind == "relativistic" else F.softplus(-p) + F.softplus(q)
        optimizer.zero_grad()
        (judged + 0.15 * penalty).mean().backward()
        optimizer.step()
        y = sample(denoiser, doubles(None, rows)[0], solver.tableau("data"))
        with torch.no_grad():
            p = D(real)
        q = D(y)
        adversarial = {"relativistic": F.softplus(p - q), "non_saturating": F.softplus(-q), "plain": -F.softplus(q)}
        solver_optimizer.zero_grad()
        ((y - real).abs().flatten(1).mean(1) + 0.7 * adversarial[kind]).mean().backward()
        torch.nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
        solver_optimizer.step()
        last = y.detach(), real

        trainer.update()
        assert relative(flat_of(trainer.solver), flat_of(solver)) < 1e-9
        for mine, wanted in zip(network.parameters(), D.parameters(), strict=True):
            assert relative(mine, wanted) < 1e-9


def test_an_iteration_peaks_in_one_of_its_phases_and_a_plan_foretells_it():
    """Not at the sum: the discriminator's step and the solver's gradient share nothing. Within 2 % of the plan."""
    torch.manual_seed(0)
    denoiser = architecture("cifar10").denoiser(small=True)
    assert denoiser.shape is not None
    shape, wide = denoiser.shape, R3GANDiscriminator([48] * 3, [6] * 3, [2] * 3)
    peaks, plans = {}, {}
    for micro in (1, BATCH):
        trainer = trainer_of(denoiser, execution=Execution(MemoryPolicy(1), micro, lean=True), network=wide)
        trainer.batches.targets = torch.zeros(10, *shape)
        trainer.update()  # moments are there
        adversary, denoiser_bytes = trainer.adversary, sum(p.nbytes for p in denoiser.parameters())
        batch = trainer.batches.at(trainer.step)
        noise = batch.noise.nbytes + batch.targets.nbytes
        with ByteTracker() as alone:
            adversary.gradient(batch.targets, partial(trainer.samples, batch.fresh, batch.cond))
            adversary.update()
        with ByteTracker() as solvers:
            trainer._gradient(batch, adversary)
        with ByteTracker() as whole:
            trainer.update()
        peaks[micro] = alone.peak, solvers.peak, whole.peak
        assert whole.peak < 1.02 * max(alone.peak, solvers.peak) + noise + 20_000
        way = plan(
            denoiser, STEPS, BATCH, 2**40, beside=adversary.beside(shape, BATCH, STEPS), blocks=("none",),
            tableau=trainer.solver.tableau("data"),
        )  # fmt: skip
        chosen = next(p for p in way if p.memory == MemoryPolicy(1))
        if micro == BATCH:
            moments = 3 * sum(p.nbytes for p in wide.parameters())
            plans[micro] = chosen.bytes - denoiser_bytes - moments
            assert whole.peak == pytest.approx(plans[micro], rel=0.02)
    assert peaks[1][0] > peaks[1][1] and peaks[BATCH][0] < peaks[BATCH][1]  # each was the largest once


def test_fresh_noise_costs_k_calls_and_reused_samples_none(tiny):
    calls = {}
    for fakes in ("fresh", "reuse"):
        trainer = trainer_of(tiny(1e-3), fakes=fakes, execution=Execution(MemoryPolicy(0)))
        count = []
        handle = trainer.denoiser.network.register_forward_hook(lambda *_, count=count: count.append(1))
        trainer.update()
        first = len(count)
        trainer.update()
        calls[fakes] = first, len(count) - first
        handle.remove()
    assert calls == {"fresh": (2 * STEPS, 2 * STEPS), "reuse": (2 * STEPS, STEPS)}


def test_fresh_seeds_are_nobody_elses(tiny):
    trainer = trainer_of(tiny(1e-3))
    seeds = [seed for step in range(5) for seed in trainer.batches.at(step).fresh]
    assert len({*seeds}) == len(seeds) and min(seeds) > 2**32


@pytest.mark.parametrize("fakes", ["fresh", "reuse"])
def test_state_goes_on_bit_for_bit(tiny, fakes):
    whole, first = (trainer_of(tiny(1e-3), 6, fakes=fakes) for _ in range(2))
    for _ in range(6):
        whole.update()
    for _ in range(3):
        first.update()
    second = trainer_of(tiny(1e-3), 6, fakes=fakes, network=discriminator(9))
    tensors, numbers = first.state()
    second.load(3, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(numbers)))
    for _ in range(3):
        second.update()
    assert torch.equal(flat_of(whole.solver), flat_of(second.solver)) and torch.equal(
        flat_of(whole.average), flat_of(second.average)
    )
    a, b = (t.adversary.discriminator.state_dict() for t in (whole, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_warm_up_leaves_the_discriminator_out(tiny):
    trainer = trainer_of(tiny(1e-3), warm_up=2)
    plain = trainer_of(tiny(1e-3))
    plain.adversary = None
    before = [p.clone() for p in trainer.adversary.discriminator.parameters()]
    for _ in range(2):
        trainer.update(), plain.update()
    assert torch.equal(flat_of(trainer.solver), flat_of(plain.solver))
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.adversary.discriminator.parameters(), strict=True))
    trainer.update(), plain.update()
    assert not torch.equal(flat_of(trainer.solver), flat_of(plain.solver)) and trainer.means.read()["d_loss"] > 0


def test_a_step_that_is_not_finite_is_left_out_without_being_read(tiny):
    adversary = trainer_of(tiny(1e-3)).adversary
    before = [p.clone() for p in adversary.discriminator.parameters()]
    adversary.gradient(torch.full((2, *SHAPE), torch.inf), lambda: torch.zeros(2, *SHAPE))
    adversary.update()
    assert all(torch.equal(p, q) for p, q in zip(before, adversary.discriminator.parameters(), strict=True))
    adversary.gradient(torch.ones(2, *SHAPE), lambda: torch.zeros(2, *SHAPE))
    adversary.update()
    moved = [not torch.equal(p, q) for p, q in zip(before, adversary.discriminator.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2 and all(p.isfinite().all() for p in adversary.discriminator.parameters())


def test_a_step_out_of_memory_takes_fewer_pairs(tiny, monkeypatch):
    """Said, and the update goes on: the same discriminator to rounding."""
    trainers = [trainer_of(tiny(1e-3), method="double_backward") for _ in range(2)]
    trainers[1].update()
    original = R3GANDiscriminator.forward

    def forward(self, x, cond=None):
        if len(x) > 1 and torch.is_grad_enabled() and next(self.parameters()).requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(self, x, cond)

    with monkeypatch.context() as patch:
        patch.setattr(R3GANDiscriminator, "forward", forward)
        trainers[0].update()
    assert [n.rpartition("with ")[2] for n in trainers[0].notices] == ["2 pairs at a time", "1 pairs at a time"]
    a, b = (torch.cat([p.flatten() for p in t.adversary.discriminator.parameters()]) for t in trainers)
    assert relative(a, b) < 1e-3 and trainers[0].execution == Execution()


def test_fewer_pairs_are_state(tiny):
    """A run that ran out of memory goes on, when resumed, as it would have."""
    first = trainer_of(tiny(1e-3), method="double_backward")
    assert first.adversary.lighten(BATCH) and first.adversary.lighten(BATCH)
    tensors, numbers = first.state()
    second = trainer_of(tiny(1e-3), method="double_backward")
    second.load(0, tensors, json.loads(json.dumps(numbers)))
    assert second.adversary.settings.micro_batch == 1
    other = trainer_of(tiny(1e-3), method="double_backward", micro_batch=3)
    other.load(0, tensors, numbers)
    assert other.adversary.settings.micro_batch == 3  # asked for anew


def test_rows_hold_means_of_what_is_finite(tiny):
    """The loss of a row is the mean since the last row: of the distance, and of the weighted adversarial loss."""
    trainer = trainer_of(tiny(1e-3), fakes="reuse")
    losses = [float(trainer.update()) for _ in range(2)]
    means = trainer.means.read()
    assert means["distillation"] + means["adversarial"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert means["d_skipped"] == 0 and trainer.means.read() == {}
    trainer.batches.targets[:] = torch.nan
    trainer.update()
    bad = trainer.means.read()
    assert bad["d_skipped"] == 0 and "distillation" not in bad  # the step saw the samples of the update before
    trainer.update()
    assert trainer.means.read()["d_skipped"] == 1 and trainer.skipped == 2


def test_going_back_slows_the_discriminator_too(tiny):
    moved = []
    for rollbacks in (0, 1):
        trainer = trainer_of(tiny(1e-3))
        trainer.rollbacks = rollbacks
        before = [p.detach().clone() for p in trainer.adversary.discriminator.parameters()]
        trainer.update()
        after = [p.detach() for p in trainer.adversary.discriminator.parameters()]
        moved.append(float(torch.stack([(p - q).norm() for p, q in zip(before, after, strict=True)]).norm()))
    assert moved[1] == pytest.approx(moved[0] / 2, rel=1e-3)


def test_parameters_that_are_not_finite_are_as_bad_as_gradients(tiny):
    trainer = trainer_of(tiny(1e-3))
    with torch.no_grad():
        trainer.solver.theta[0] = torch.inf
    with pytest.raises(NotFinite, match=r"--rate .* --discriminator-rate than 0\.001"):
        trainer.update()


def test_a_plan_takes_as_few_pairs_as_its_budget_asks(tiny):
    adversary = Adversary(discriminator(), Adversarial(method="double_backward"))
    whole = adversary.beside(SHAPE, BATCH, STEPS)
    less = adversary.fitted(SHAPE, BATCH, STEPS, whole.bytes + whole.samples + int(0.7 * whole.step))
    assert adversary.settings.micro_batch == 2 and less.step < 0.7 * whole.step and less.bytes == whole.bytes


def test_half_precision_is_near(tiny):
    """A discriminator in bfloat16: the solver's gradient within a few per cent; its weights stay float32."""
    grads = []
    for precision in (None, torch.bfloat16):
        trainer = trainer_of(tiny(1e-3), precision=precision)
        trainer.update()
        grads.append(trainer.solver.phi_c.grad.clone())
        assert all(p.dtype == torch.float32 for p in trainer.adversary.discriminator.parameters())
    assert relative(*grads) < 0.1


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": -1.0},
        {"gamma": float("nan")},
        {"rate": 0.0},
        {"rate": float("inf")},
        {"warm_up": -1},
        {"micro_batch": 0},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))}.*{next(iter(bad.values()))}"):
        Adversarial(**bad)
