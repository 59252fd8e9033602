"""Pictures are files of the size one expects; what cannot be drawn is refused by name."""

from __future__ import annotations

import matplotlib.image
import pytest
import torch

from gas_engine import Schedule
from gas_engine.pictures import history_plot
from gas_engine.solvers.generalized import GeneralizedSolver


def history(steps, readings):
    solver = GeneralizedSolver(steps, Schedule.edm())
    tableau = solver.tableau("data")
    rows = [(t.detach() * (1 + r / 100)) for r in range(readings) for t in (solver.times(), tableau.t_net)]
    matrices = [torch.stack([m.detach() * (1 + r / 50) for r in range(readings)]) for m in (tableau.A, tableau.B)]
    return list(range(0, 20 * readings, 20)), torch.stack(rows[::2]), torch.stack(rows[1::2]), *matrices


@pytest.mark.parametrize(("steps", "readings"), [(1, 1), (4, 9)])
def test_history(tmp_path, steps, readings):
    history_plot(tmp_path / "history.png", *history(steps, readings), title="toy")
    assert matplotlib.image.imread(tmp_path / "history.png").shape[:2] == (
        792,
        max(715, int(110 * (1.9 * steps + 0.8))),
    )


def test_history_refuses_other_shapes(tmp_path):
    updates, times, told, a, b = history(4, 3)
    with pytest.raises(ValueError, match=r"told must be \[3, 4\] for 3 readings, got \[2, 4\]"):
        history_plot(tmp_path / "history.png", updates, times, told[:2], a, b)
    assert not list(tmp_path.iterdir())
