"""The tableau: checks on construction, derived predicates, and folding against conversions written out."""

from __future__ import annotations

import pytest
import torch
from toy import mixture, noise
from twin import noise_from_output, plain_rollout, relative

from gas_engine import GeneralizedSolver, Schedule, Tableau, rollout
from gas_engine.solvers import classical, grid
from gas_engine.tableau import PREDICTIONS

VP, FLOW = Schedule.vp_linear(0.1, 20.0), Schedule.flow()


def lower(steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(steps, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tril()


def raw(steps: int = 3, **changes) -> Tableau:
    values = {"A": lower(steps), "B": lower(steps, 1), "t_net": torch.linspace(1, 0.1, steps, dtype=torch.float64)}
    return Tableau(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"A": torch.zeros(2, 3, dtype=torch.float64)}, r"\(2, 3\)"),
        ({"B": lower(2)}, r"B must have shape \(3, 3\)"),
        ({"A": lower(3).T.contiguous()}, "A must be lower triangular"),
        ({"B": lower(3).float()}, "float32"),
        ({"t_net": torch.ones(4, dtype=torch.float64)}, r"\(4,\)"),
        ({"A": lower(3) * torch.nan}, "not finite"),
        ({"prediction": "score"}, "'score'"),
        ({"A": torch.zeros(0, 0, dtype=torch.float64)}, r"\(0, 0\)"),
    ],
)
def test_construction_refuses(changes, seen):
    with pytest.raises(ValueError, match=seen):
        raw(**changes)


def test_frozen_and_defaults():
    tableau = raw()
    assert tableau.steps == 3 and bool((tableau.c_in == 1).all()) and not tableau.explicit_input_scale
    with pytest.raises(AttributeError):
        tableau.A = lower(3)
    assert not tableau.requires_grad and raw(A=lower(3).requires_grad_()).requires_grad
    assert raw(c_in=torch.full((3,), 2.0, dtype=torch.float64)).explicit_input_scale


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_is_derived(order):
    tableau = classical.dpmpp(VP, grid("logSNR", VP, 6), order=order)
    assert tableau.order == order and f"order {order}" in repr(tableau)


def test_reversible_is_derived():
    assert not raw().reversible
    a = torch.diag(torch.full((4,), 0.5)) + torch.diag(torch.full((3,), 0.3), -1)
    two_state = Tableau(a.double(), torch.eye(4, dtype=torch.float64), torch.linspace(1, 0.1, 4, dtype=torch.float64))
    assert two_state.reversible and "reversible" in repr(two_state)
    broken = two_state.A.clone()
    broken[2, 1] = 0
    assert not Tableau(broken, two_state.B, two_state.t_net).reversible
    assert not classical.dpmpp(VP, grid("logSNR", VP, 6), order=2).reversible


def test_repr_shows_the_numbers():
    text = repr(classical.ddim(VP, grid("uniform", VP, 2)))
    assert "ddim: 2 steps" in text and "1.000000" in text and len(text.splitlines()) == 4


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_fold_equals_conversions_around_the_network(prediction, order):
    """F -> e at the told time t + xi, e -> m at t; the solver then uses m."""
    schedule = FLOW if prediction == "flow" else VP
    solver = GeneralizedSolver(4, schedule, 1e-3, order=order)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in solver.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    denoiser = mixture(schedule, prediction)
    times, told = solver.times(), solver.told_times()
    unfolded = solver.tableau("data" if prediction != "data" else "noise")
    x, states, estimates = noise(), [noise()], []
    own = _own_tableau(solver)
    for n in range(4):
        output = denoiser(states[n], told[n])
        e = noise_from_output(prediction, states[n], output, schedule, told[n])
        # The first state of a flow is noise alone, where m is taken at the told time as well.
        alpha, sigma, _ = schedule(told[n] if prediction == "flow" and n == 0 else times[n])
        estimates.append((states[n] - sigma * e) / alpha)
        states.append(sum(own.A[n, j] * states[j] + own.B[n, j] * estimates[j] for j in range(n + 1)))
    assert unfolded.folded
    assert relative(rollout(denoiser, x, solver.tableau(prediction)), states[-1]) < 1e-9


def _own_tableau(solver: GeneralizedSolver) -> Tableau:
    """The solver's tableau on data estimates, before folding: xi only enters through the conversion."""
    plain = GeneralizedSolver(solver.steps, solver.schedule, solver.t_eps, solver.order)
    plain.load_state_dict({**solver.state_dict(), "xi": torch.zeros_like(solver.xi)})
    return plain.tableau("data")


@pytest.mark.parametrize("make", [classical.dpmpp, classical.ipndm, classical.unipc])
def test_prediction_types_agree_without_offsets(make):
    """The exact model gives the same samples however its output is expressed."""
    tableau = make(VP, grid("quadratic", VP, 5), order=3)
    results = [rollout(mixture(VP, p), noise(), tableau) for p in ("data", "noise", "velocity")]
    assert all(relative(result, results[0]) < 1e-9 for result in results)


def test_fold_refuses_what_it_cannot_know():
    with pytest.raises(ValueError, match="without nodes or schedule"):
        raw(prediction="data").fold("noise")
    folded = classical.ddim(VP, grid("uniform", VP, 3)).fold("noise")
    assert folded.fold("noise") is folded
    with pytest.raises(ValueError, match="already folded for a noise network"):
        folded.fold("data")
    with pytest.raises(ValueError, match="'score'"):
        folded.fold("score")


def test_raw_tableau_multiplies_the_output_as_it_is():
    tableau = raw()
    for prediction in ("noise", "data"):
        denoiser = mixture(VP, prediction)
        assert relative(rollout(denoiser, noise(), tableau), plain_rollout(denoiser, noise(), tableau)) < 1e-13
