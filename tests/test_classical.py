"""Classical solvers against reference samples, diffusers' schedulers, exact solutions and their orders."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from toy import SHAPE, mixture, noise
from twin import relative

from gas_engine import Denoiser, Schedule, rollout
from gas_engine.solvers import GRIDS, classical, grid, noise_levels
from gas_engine.solvers._theory import phi
from gas_engine.solvers.named import ALIASES, FAMILIES, MAKERS, named_solver

VP = Schedule.vp_linear(0.1, 20.0)
UNIPC = "UniPCMultistepScheduler"


def test_unipc_teacher_matches_reference(golden, tiny):
    wanted, denoiser = golden("teachers_f64"), tiny(1e-4)
    times = grid("logSNR", denoiser.schedule, 20, 1e-4)
    assert relative(times, wanted["logSNR_bh1_20_timesteps"]) < 1e-9
    x = golden("inputs")["noise"].double()
    tableau = classical.unipc(denoiser.schedule, times, order=3, variant="bh1")
    assert relative(rollout(denoiser, x, tableau), wanted["logSNR_bh1_20_x0"]) < 1e-9
    assert relative(rollout(denoiser, x.float(), tableau), wanted["logSNR_bh1_20_x0"]) < 1e-4


def test_ipndm_teacher_matches_reference(golden, tiny):
    wanted, denoiser = golden("teachers_f64"), tiny(1e-3)
    times = noise_levels(denoiser.schedule, wanted["ipndm_s5_sigmas"])
    assert relative(times, wanted["ipndm_s5_o2_timesteps"]) < 1e-9
    tableau = classical.ipndm(denoiser.schedule, times, order=2)
    assert relative(rollout(denoiser, golden("inputs")["noise"].double(), tableau), wanted["ipndm_s5_o2_x0"]) < 1e-9


def _diffusers(name: str, **options):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    common = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    if name != "DEISMultistepScheduler":  # which ends there always
        common["final_sigmas_type"] = "sigma_min"
    return getattr(diffusers, name)(**common, **options)


@pytest.mark.parametrize(
    ("scheduler", "options", "make"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, classical.ddim),
        ("DPMSolverMultistepScheduler", {"solver_order": 2}, lambda s, t: classical.dpmpp(s, t, 2)),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, lambda s, t: classical.dpmpp(s, t, 3)),
        (UNIPC, {"solver_order": 2, "solver_type": "bh1"}, lambda s, t: classical.unipc(s, t, 2, "bh1")),
        (UNIPC, {"solver_order": 2, "solver_type": "bh2"}, lambda s, t: classical.unipc(s, t, 2, "bh2")),
        (UNIPC, {"solver_order": 3, "solver_type": "bh1"}, lambda s, t: classical.unipc(s, t, 3, "bh1")),
        (UNIPC, {"solver_order": 3, "solver_type": "bh2"}, lambda s, t: classical.unipc(s, t, 3, "bh2")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("steps", [6, 9])
def test_agrees_with_diffusers(scheduler, options, make, steps):
    """The same noise-predicting model through diffusers' scheduler, step by step (its sigmas are float32)."""
    theirs = _diffusers(scheduler, **options, timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    schedule = Schedule.vp_discrete(theirs.alphas_cumprod)
    labels = [*theirs.timesteps.tolist(), 0]
    times = torch.tensor([(label + 1) / 1000 for label in labels], dtype=torch.float64)
    denoiser = mixture(schedule, "noise")
    x = noise()
    for label in theirs.timesteps:
        output = denoiser(x, torch.tensor((int(label) + 1) / 1000, dtype=torch.float64))
        x = theirs.step(output, label, x).prev_sample
    assert relative(rollout(denoiser, noise(), make(schedule, times)), x) < 2e-4


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_agrees_with_diffusers(order):
    theirs = _diffusers(
        "DEISMultistepScheduler", solver_order=order, timestep_spacing="linspace", lower_order_final=False
    )
    theirs.set_timesteps(6)
    schedule = Schedule.vp_discrete(theirs.alphas_cumprod)
    times = torch.tensor([(t + 1) / 1000 for t in [*theirs.timesteps.tolist(), 0]], dtype=torch.float64)
    denoiser, x = mixture(schedule, "noise"), noise()
    for label in theirs.timesteps:
        output = denoiser(x, torch.tensor((int(label) + 1) / 1000, dtype=torch.float64))
        x = theirs.step(output, label, x).prev_sample
    # Its polynomials run over the logarithm of sigma / alpha, which is -lambda.
    tableau = classical.deis(schedule, times, order, variable="lam")
    assert relative(rollout(denoiser, noise(), tableau), x) < 2e-4


def gaussian(schedule: Schedule, width: float = 0.5) -> Denoiser:
    """N(0, width^2) data: the probability flow is linear, x(t) = x(T) std(t) / std(T)."""

    def data(x, t, cond):
        alpha, sigma, _ = schedule(t)
        return alpha * width**2 / (alpha**2 * width**2 + sigma**2) * x

    return Denoiser(data, schedule, "data", SHAPE)


@pytest.mark.parametrize("schedule", [VP, Schedule.flow(), Schedule.flow(3.0)], ids=["vp", "flow", "flow shifted"])
@pytest.mark.parametrize(
    ("make", "order"),
    [
        (classical.ddim, 1),
        (classical.heun, 2),
        (lambda s, t: classical.dpmpp(s, t, 2, lower_order_final=False), 2),
        # Its first, first-order step leaves an error of h^2, however good the rest.
        (lambda s, t: classical.dpmpp(s, t, 3, lower_order_final=False), 2),
        (lambda s, t: classical.unipc(s, t, 2, "bh2", lower_order_final=False), 3),
        (lambda s, t: classical.unipc(s, t, 3, "bh1", lower_order_final=False), 1.7),
        (lambda s, t: classical.ipndm(s, t, 2), 2),
        (lambda s, t: classical.deis(s, t, 2), 2),
        (lambda s, t: classical.deis(s, t, 3), 2.4),
        (lambda s, t: classical.deis(s, t, 3, "lam"), 2.4),
    ],
    ids=["ddim", "heun", "dpmpp2", "dpmpp3", "unipc2", "unipc3", "ipndm2", "deis2", "deis3", "deis3 lam"],
)
def test_order_of_convergence(schedule, make, order):
    """Halving the step from a smooth interior grid divides the error by about 2^order."""
    start, end = 0.8, 0.05
    alpha, sigma, _ = schedule(torch.tensor([start, end], dtype=torch.float64))
    std = (alpha**2 * 0.25 + sigma**2).sqrt()
    exact = noise() * std[1] / std[0]
    errors = []
    for steps in (40, 80):
        lam = torch.linspace(float(schedule.lam(start)), float(schedule.lam(end)), steps + 1, dtype=torch.float64)
        errors.append(relative(rollout(gaussian(schedule), noise(), make(schedule, schedule.inverse(lam))), exact))
    assert math.log2(errors[0] / errors[1]) > order - 0.35
    assert errors[1] < {1: 0.03, 1.7: 1e-6, 3: 1e-4}.get(order, 2e-3)


def test_ddim_is_euler_in_flow_time():
    schedule = Schedule.flow()
    denoiser, times, x = mixture(schedule, "flow"), grid("uniform", schedule, 7), noise()
    sampled = rollout(denoiser, x, classical.ddim(schedule, times))
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * denoiser(x, now)
    assert relative(sampled, x) < 1e-9


def test_heun_equals_its_textbook_loop():
    """Heun on y = x / alpha against s = sigma / alpha: dy/ds = e."""
    denoiser, times = mixture(VP, "noise"), grid("karras", VP, 5, 1e-3)
    for euler_final in (False, True):
        x = noise()
        for n, (now, then) in enumerate(itertools.pairwise(times)):
            (a0, s0, _), (a1, s1, _) = VP(now), VP(then)
            slope = denoiser(x, now)
            y = x / a0 + (s1 / a1 - s0 / a0) * slope
            if not (euler_final and n == 4):
                slope = (slope + denoiser(y * a1, then)) / 2
                y = x / a0 + (s1 / a1 - s0 / a0) * slope
            x = y * a1
        tableau = classical.heun(VP, times, euler_final)
        assert tableau.steps == 10 - euler_final
        assert relative(rollout(denoiser, noise(), tableau), x) < 1e-9


@pytest.mark.parametrize("h", [1e-9, 1e-5, 9.9e-3, 1.01e-2, 0.3, 4.0, -0.005])
def test_phi_functions_keep_their_digits(h):
    import mpmath

    mpmath.mp.dps = 50
    exact1 = mpmath.expm1(-mpmath.mpf(h))
    exact2 = exact1 / mpmath.mpf(h) + 1
    exact3 = exact2 / mpmath.mpf(h) - mpmath.mpf(1) / 2
    for got, wanted in zip(phi(torch.tensor(h, dtype=torch.float64)), (exact1, exact2, exact3), strict=True):
        assert abs(float(got) / float(wanted) - 1) < 2e-10


def test_phi_functions_are_differentiable():
    h = torch.tensor([1e-4, 5e-3, 0.02, 1.5], dtype=torch.float64, requires_grad=True)
    for index in range(3):
        assert torch.autograd.gradcheck(lambda h, i=index: phi(h)[i], h)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("schedule", [VP, Schedule.flow(2.0)], ids=["vp", "flow"])
def test_grids(kind, schedule):
    times = grid(kind, schedule, 8, 1e-3)
    assert len(times) == 9 and float(times[0]) == schedule.t_start and float(times[-1]) == 1e-3
    assert bool((times[1:] < times[:-1]).all())
    ratio = torch.exp(-schedule.lam(times))
    even = {"uniform": times, "quadratic": times.sqrt(), "logSNR": schedule.lam(times), "karras": ratio ** (1 / 7)}[
        kind
    ]
    gaps = even[1:] - even[:-1]
    assert torch.allclose(gaps, gaps.mean().expand(8), rtol=1e-6)


def test_times_are_differentiable():
    """Classical solvers can serve as base of learned times."""
    times = grid("quadratic", VP, 4, 1e-3).requires_grad_()
    for maker in MAKERS.values():
        if maker is not classical.heun:
            loss = rollout(mixture(), noise(), maker(VP, times)).square().sum()
            (slope,) = torch.autograd.grad(loss, times)
            assert bool(torch.isfinite(slope).all()) and bool((slope != 0).any())


@pytest.mark.parametrize("name", [*MAKERS, *ALIASES])
def test_named_solvers_use_exactly_k_evaluations(name):
    for steps in (1, 2, 5):
        denoiser = mixture()
        tableau = named_solver(name, denoiser.schedule, steps, "logSNR")
        assert bool(torch.isfinite(rollout(denoiser, noise(), tableau)).all())
        assert denoiser.function.calls == steps == tableau.steps


def test_families_cover_every_name():
    assert set().union(*FAMILIES.values()) == set(MAKERS)


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: grid("cosine", VP, 4), "cosine"),
        (lambda: grid("uniform", VP, 0), "0"),
        (lambda: grid("uniform", VP, 4, 1.5), "1.5"),
        (lambda: classical.dpmpp(VP, torch.tensor([0.1, 0.5])), "fall strictly"),
        (lambda: classical.dpmpp(VP, torch.tensor([0.5])), r"\(1,\)"),
        (lambda: classical.dpmpp(VP, torch.tensor([0.5, -0.1])), "-0.1"),
        (lambda: classical.dpmpp(VP, grid("uniform", VP, 3), order=4), "4"),
        (lambda: classical.unipc(VP, grid("uniform", VP, 3), variant="bh3"), "bh3"),
        (lambda: classical.deis(VP, grid("uniform", VP, 3), variable="x"), "'x'"),
        (lambda: named_solver("rk45", VP, 4), "rk45"),
        (lambda: named_solver("heun", VP, 0), "0"),
    ],
)
def test_bad_input_names_the_value(make, seen):
    with pytest.raises(ValueError, match=seen):
        make()
