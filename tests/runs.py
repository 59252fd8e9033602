"""Short training runs on the toy model, by the class and by the verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import toy

from gas_engine import GeneralizedSolver
from gas_engine.execution import Execution
from gas_engine.losses import distillation_loss
from gas_engine.training import setup
from gas_engine.training.recipe import Recipe
from gas_engine.training.trainer import Trainer

HERE = Path(__file__).parent


def flat(solver, grad=False):
    """Reference order: theta, xi, c_1, a_1, c_2, a_2, ..."""
    of = (lambda p: p.grad) if grad else (lambda p: p.detach())
    rows = [of(solver.theta), of(solver.xi)]
    for lag in range(solver.order):
        rows += [of(solver.phi_c)[:, lag], of(solver.phi_a)[:, lag]]
    return torch.cat(rows).clone()


def flat_of(solver):
    return torch.cat([p.detach().flatten() for p in solver.parameters()])


def toy_trainer(denoiser=None, execution=None, adversary=None, seed=0, student=GeneralizedSolver, **recipe):
    denoiser = denoiser or toy.mixture()
    solver = student(3, denoiser.schedule, start="quadratic")
    plain = {"iterations": 8, "batch": 4, "rate": 1e-2, "rate_schedule": "cosine", "ema": 0.9, "start_grid": ""}
    return Trainer(
        denoiser, solver, list(range(10)), torch.zeros(10, *toy.SHAPE), distillation_loss("l2"),
        Recipe(**{**plain, **recipe}), execution or Execution(), seed, adversary=adversary,
    )  # fmt: skip


def options(out, *more):
    return [
        "--model", "toy:make", "--steps", "2", "--recipe", "quick", "--train-seeds", "0-31", "--batch", "4",
        "--teacher-set", str(out.parent / "teacher"), "--out", str(out), "--device", "cpu", *more,
    ]  # fmt: skip


def brief(out, *more):
    """Options of a run of nothing but its updates."""
    return options(out, "--evaluation", "student", "--logger", "none", "--sample-every", "1000", *more)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoints(out):
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())


def hidden(out):
    """What a write that failed may have left."""
    return [path for path in out.rglob(".*")]


@pytest.fixture
def small(monkeypatch):
    """Small evaluation sets, no pictures, and a path to the toy model."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(setup, "SELECTION_SEEDS", range(40_000, 40_008))
    monkeypatch.setattr(setup, "HELD_OUT_SEEDS", range(50_000, 50_016))


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of the time of a short run."""
    for name in ("image_rows", "schedule_plot", "tableau_plot"):
        monkeypatch.setattr(f"gas_engine.pictures.{name}", lambda *_, **__: None)
