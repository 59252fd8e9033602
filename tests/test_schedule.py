"""Schedules against reference numbers, high-precision arithmetic and their own inverses."""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twin import relative

from gas_engine import Schedule

SCHEDULES = {
    "vp_linear": Schedule.vp_linear(0.1, 20.0),
    "vp_discrete": Schedule.vp_discrete(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)),
    "edm": Schedule.edm(1e-3, 0.002, 80.0),
    "flow": Schedule.flow(),
    "flow shifted": Schedule.flow(3.0),
}


@pytest.mark.parametrize("t_eps", ["0.001", "0.0001"])
@pytest.mark.parametrize(("clip", "low", "high"), [("clip80", 0.002, 80.0), ("noclip", 0.0, float("inf"))])
def test_edm_mapping_matches_reference(golden, t_eps, clip, low, high):
    wanted = {k.removeprefix(f"edm_te{t_eps}_{clip}_"): v for k, v in golden("schedules_f64").items()}
    schedule = Schedule.edm(float(t_eps), low, high)
    t = wanted["t"]
    assert schedule.parameters["beta_0"] == pytest.approx(float(wanted["beta0"]), rel=1e-9)
    assert schedule.parameters["beta_1"] == pytest.approx(float(wanted["beta1"]), rel=1e-9)
    assert relative(schedule.log_alpha(t), wanted["marginal_log_mean_coeff"]) < 1e-9
    assert relative(schedule.alpha(t), wanted["marginal_alpha"]) < 1e-9
    assert relative(schedule.sigma(t), wanted["marginal_std"]) < 1e-9
    assert relative(schedule.lam(t), wanted["marginal_lambda"]) < 1e-9
    assert relative(schedule.inverse(wanted["marginal_lambda"]), wanted["inverse_lambda_of_lambda"]) < 1e-9
    assert relative(schedule.sigma(t) / schedule.alpha(t), wanted["net_sigma"]) < 1e-9


def test_discrete_matches_reference_also_beyond_its_ends(golden):
    wanted = golden("schedules_f64")
    schedule = Schedule.vp_discrete(wanted["disc_alphas_cumprod_f32"])
    t = wanted["disc_t"].requires_grad_()
    lam = schedule.lam(t)
    (slope,) = torch.autograd.grad(lam.sum(), t)
    assert relative(schedule.log_alpha(t), wanted["disc_marginal_log_mean_coeff"]) < 1e-9
    assert relative(schedule.sigma(t), wanted["disc_marginal_std"]) < 1e-9
    assert relative(lam, wanted["disc_marginal_lambda"]) < 1e-9
    assert relative(schedule.inverse(wanted["disc_lam"]), wanted["disc_inverse_lambda"]) < 1e-9
    # On a knot the derivative jumps and either side is right.
    distance = (t.detach() * 1000 - (t.detach() * 1000).round()).abs()
    smooth = distance > 1e-6
    assert smooth.sum() >= 55
    assert relative(slope[smooth], wanted["disc_dlambda_dt"][smooth]) < 1e-9


@pytest.mark.parametrize("name", SCHEDULES)
def test_inverse_and_monotony(name):
    schedule = SCHEDULES[name]
    t = torch.linspace(2e-3, schedule.t_start, 257, dtype=torch.float64)
    lam = schedule.lam(t)
    assert bool((lam[1:] < lam[:-1]).all())
    assert torch.allclose(schedule.inverse(lam), t, rtol=1e-8, atol=1e-12)
    alpha, sigma, again = schedule(t)
    assert torch.allclose(alpha.log() - sigma.log(), again, rtol=1e-7, atol=1e-7)
    total = alpha + sigma if schedule.kind == "flow" else alpha**2 + sigma**2
    assert torch.allclose(total, torch.ones_like(total), atol=1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients(name):
    schedule = SCHEDULES[name]
    t = torch.tensor([0.0123, 0.3337, 0.9121], dtype=torch.float64, requires_grad=True)
    for quantity in (schedule.alpha, schedule.sigma, schedule.lam, lambda t: schedule.inverse(schedule.lam(t) + 0.01)):
        assert torch.autograd.gradcheck(quantity, t)


@pytest.mark.parametrize("t", [1e-7, 1e-5, 1e-3, 0.1])
def test_sigma_keeps_its_digits(t):
    """float32-style sqrt(1 - exp) loses half of them at small t; expm1 does not."""
    mpmath.mp.dps = 40
    beta_0, beta_1, time = mpmath.mpf(0.1), mpmath.mpf(20.0), mpmath.mpf(t)
    exact = mpmath.sqrt(-mpmath.expm1(2 * (-(time**2) * (beta_1 - beta_0) / 4 - time * beta_0 / 2)))
    assert abs(float(SCHEDULES["vp_linear"].sigma(t)) / float(exact) - 1) < 1e-14


def test_float32_times_are_not_rounded_further():
    assert SCHEDULES["vp_linear"].sigma(torch.tensor(0.5, dtype=torch.float32)).dtype == torch.float64


@given(st.floats(0.2, 12.0), st.floats(0.001, 0.999))
def test_flow_shift_matches_its_definition(shift, t):
    sigma = float(Schedule.flow(shift).sigma(t))
    assert abs(sigma - shift * t / (1 + (shift - 1) * t)) < 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_config_round_trip(name):
    schedule = SCHEDULES[name]
    assert Schedule.from_config(schedule.config()) == schedule
    assert schedule != Schedule.vp_linear(0.2, 9.0)
    assert name.split()[0].replace("edm", "vp_linear") in repr(schedule)


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: Schedule.vp_linear(2.0, 1.0), "beta_0=2.0"),
        (lambda: Schedule.vp_discrete([0.5]), r"\(1,\)"),
        (lambda: Schedule.vp_discrete([0.5, 0.7]), "fall strictly"),
        (lambda: Schedule.edm(0.0), "0.0"),
        (lambda: Schedule.edm(1e-3, 90.0, 80.0), "sigma_min=90"),
        (lambda: Schedule.flow(-1.0), "-1.0"),
        (lambda: Schedule.from_config({"kind": "cosine"}), "cosine"),
        (lambda: Schedule.from_config({"kind": "flow", "slip": 1}), "slip"),
    ],
)
def test_bad_input_names_the_value(make, seen):
    with pytest.raises(ValueError, match=seen):
        make()
