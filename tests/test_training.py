"""Training against a reference run; batches, optimisers, recipes."""

from __future__ import annotations

import csv

import pytest
import torch
import toy
from runs import flat, toy_trainer
from test_waits import Waits
from twin import relative

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, train
from gas_engine.execution import Execution
from gas_engine.losses import distillation_loss
from gas_engine.training.recipe import RECIPES, Recipe
from gas_engine.training.soap import SOAP
from gas_engine.training.trainer import OutOfMemory, Trainer


@pytest.mark.parametrize("every", [0, 1, 3])
def test_twenty_iterations_match_reference(golden, tiny, every, monkeypatch):
    """Losses, gradients, parameters and averages of Adam 1e-3, clip 1.0, EMA 0.999 with warm-up, in float64."""
    data, wanted = golden("train_data"), golden("train_loss_l1_f64")
    denoiser = tiny(1e-3)
    solver = GeneralizedSolver(4, denoiser.schedule, 1e-3)
    recipe = Recipe(iterations=20, batch=8, rate=1e-3, rate_schedule="constant", ema=0.999, start_grid="uniform")
    noise, grads = data["noise"].double(), []
    monkeypatch.setattr("gas_engine.training.batches.seeded", lambda denoiser, rows: (noise[rows], None))
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
    trainer.batches.rows = lambda step: data["idx"][step].tolist()
    for step, loss in trainer:
        assert float(loss) == pytest.approx(float(wanted["losses"][step - 1]), rel=1e-7)
        assert relative(grads[-1], wanted["grads"][step - 1]) < 1e-7
        assert relative(flat(solver), wanted["params"][step]) < 1e-7
        assert relative(flat(trainer.average), wanted["ema"][step]) < 1e-7
    assert trainer.step == 20 and trainer.skipped == 0


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
    seen = [row for step in range(5) for row in trainer.batches.rows(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert [toy_trainer().batches.rows(3), toy_trainer(seed=1).batches.rows(3)][0] == trainer.batches.rows(3)
    assert toy_trainer(seed=1).batches.rows(3) != trainer.batches.rows(3)


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
    assert RECIPES["paper"] == Recipe(10_000, 24, 1e-3, "constant", 0.999, "uniform")
    quick = RECIPES["quick"]
    assert (quick.rate, quick.rate_schedule, quick.ema, quick.start_grid) == (1e-2, "cosine", 0.99, "quadratic")
    assert (RECIPES["paper"].optimizer, quick.optimizer) == ("adam", "soap")
    assert quick.rate_at(0) == 1e-2 and quick.rate_at(quick.iterations) == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_quick_recipe_beats_every_classical_solver(tmp_path, monkeypatch):
    """The default run on the digits: held-out L1 at most 1/2.5 of the best classical solver's at K = 4."""
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint-every", "1", "--device", "cpu"])
    with open(tmp_path / "runs" / "digits-gs-k4" / "comparison.csv", newline="") as file:
        l1 = {row["solver"]: float(row["l1"]) for row in csv.DictReader(file)}
    assert l1.pop("teacher") == 0 and l1.pop("learned (gs)") * 2.5 <= min(l1.values()) and len(l1) == 7


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_an_update_waits_for_its_gradient_alone(micro_batch, monkeypatch):
    """Not for the loss, which is read where a row of metrics is made: one copy to the host for each micro-batch."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # which meta has none of
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 2, 3, padding=1).to("meta").requires_grad_(False)
    denoiser = Denoiser(lambda x, t, cond: network(x), toy.mixture().schedule, "data", toy.SHAPE, network=network)
    trainer = toy_trainer(denoiser, Execution(micro_batch=micro_batch))
    trainer.device = trainer.batches.device = torch.device("meta")
    with Waits() as waits:
        loss = trainer.update()
        trainer.update()
    assert waits.count == 2 * (4 // (micro_batch or 4)) and loss.is_meta and trainer.skipped == 0
