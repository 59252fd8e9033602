"""sample_gas on sigma-space denoisers: the same samples as rollout."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from test_export import KINDS, SD, SHAPE, Network, denoiser, learned, noise

from gas_engine import BELMSolver, Denoiser, Schedule, rollout
from gas_engine.export import for_sigma_space, sample_gas
from gas_engine.solvers import classical


def level(schedule, t):
    """The noise level that k-diffusion gives time t."""
    alpha, sigma, _ = schedule(t)
    return sigma if schedule.kind == "flow" else sigma / alpha


def time_of(schedule, sigma):
    """Its inverse; a flow's may be told a little beyond sigma = 1."""
    sigma = sigma.double()
    if schedule.kind == "flow":
        shift = schedule.parameters["shift"]
        return sigma / (shift - (shift - 1) * sigma)
    return schedule.inverse(-sigma.log())


def wrapped(model, calls=None):
    """A denoiser in t as a sigma-space denoiser that returns data: what k-diffusion and ComfyUI make of a network."""
    schedule = model.schedule

    def call(x, sigma, cond):
        assert sigma.shape == (len(x),)
        if calls is not None:
            calls.append(float(sigma[0]))
        t = time_of(schedule, sigma[0])
        alpha, noise_level = (value.to(x.dtype) for value in schedule(t)[:2])
        state = x if schedule.kind == "flow" else alpha * x
        output = model(state, t, cond)
        return {
            "noise": lambda: (state - noise_level * output) / alpha,
            "data": lambda: output,
            "velocity": lambda: alpha * state - noise_level * output,
            "flow": lambda: state - noise_level * output,
        }[model.prediction]()

    return call


@pytest.mark.parametrize("prediction", list(KINDS))
def test_the_same_samples_as_rollout(prediction):
    schedule, model = KINDS[prediction], denoiser(prediction, Network())
    solver = learned(5, schedule)
    with torch.no_grad():
        wanted = rollout(model, noise(), solver.tableau(prediction), torch.ones(2))
        alpha = 1.0 if schedule.kind == "flow" else float(schedule.alpha(schedule.t_start))
        last = 1.0 if schedule.kind == "flow" else float(schedule.alpha(solver.t_eps))
    sigmas = torch.cat([level(schedule, schedule.t_start).float()[None], torch.tensor([5.0, 1.0, 0.5, 0.1, 0.0])])
    seen = []
    found = sample_gas(
        wrapped(model), noise() / alpha, sigmas, {"cond": torch.ones(2)}, seen.append, solver=for_sigma_space(solver)
    )
    # float32 sigmas tell a time to a few ulp, which a noise-predicting network feels most at its first step.
    torch.testing.assert_close(found * last, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    assert [row["i"] for row in seen] == list(range(5))
    assert all(row["x"].shape == row["denoised"].shape == found.shape for row in seen)
    assert [round(float(row["sigma"]), 4) for row in seen] == [
        round(float(level(schedule, t)), 4) for t in solver.told_times().detach()
    ]


def test_a_later_start_goes_on_from_its_own_level():
    """img2img: DPM-Solver++(2M) from the level that the program says over the later nodes."""
    for prediction, first in (("noise", 2.0), ("flow", 0.7)):
        schedule, model = KINDS[prediction], denoiser(prediction, Network())
        solver, calls = learned(5, schedule), []
        nodes = solver.times().detach()
        start = time_of(schedule, torch.tensor(first))
        levels = level(schedule, nodes)
        nearest = int((levels.log() - torch.tensor(first).log()).abs().argmin())
        times = torch.cat([start[None], nodes[nearest + 1 :]])
        with torch.no_grad():
            wanted = rollout(model, noise(), classical.dpmpp(schedule, times, 2), torch.ones(2))
        scale, last = (1.0, 1.0) if schedule.kind == "flow" else (float(schedule.alpha(t)) for t in times[[0, -1]])
        found = sample_gas(
            wrapped(model, calls), noise() / scale, [first, 0.3, 0.0], {"cond": torch.ones(2)},
            solver=for_sigma_space(solver),
        )  # fmt: skip
        torch.testing.assert_close(found * last, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))
        assert calls[0] == pytest.approx(first) and len(calls) == len(times) - 1


def test_the_solver_with_about_as_many_steps_goes_on():
    numbers, calls = for_sigma_space([learned(4), learned(8)]), []
    call = wrapped(denoiser("noise", Network()), calls)
    for wanted, found in ((1, 3), (3, 3), (6, 5)):  # of four steps three are left from there, of eight five
        calls.clear()
        sample_gas(call, noise(), torch.linspace(3.0, 0.0, wanted + 1), {"cond": torch.ones(2)}, solver=numbers)
        assert len(calls) == found, calls


def test_below_the_last_level_nothing_is_left_to_do():
    x = noise()
    assert torch.equal(sample_gas(None, x, [1e-3, 0.0], solver=for_sigma_space(learned(4))), x)


def test_from_a_file_in_half_precision(tmp_path):
    (tmp_path / "solver.json").write_text(json.dumps(for_sigma_space([learned(4), BELMSolver(6, SD)])))
    sampler = functools.partial(sample_gas, solver=tmp_path / "solver.json")
    model = wrapped(denoiser("noise", Network()))
    sigmas = torch.linspace(14.6146, 0, 7)
    found = sampler(model, noise(dtype=torch.bfloat16), sigmas, {"cond": torch.ones(2)}, disable=True)
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())
    with pytest.raises(ValueError, match="no learned solver of 5 steps; the number of steps must be one of 4, 6"):
        sampler(model, noise(), sigmas[:6], {"cond": torch.ones(2)})
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="no numbers of learned solvers"):
        sample_gas(model, noise(), sigmas, solver=tmp_path / "other.json")


def test_the_file_needs_torch_alone():
    script = "import sys; sys.modules['gas_engine'] = None; import runpy; runpy.run_path(sys.argv[1])['sample_gas']"
    from gas_engine.export import k_diffusion

    subprocess.run([sys.executable, "-c", script, k_diffusion.__file__], check=True, capture_output=True, timeout=300)


def k_diffusions_external():
    """k_diffusion.external alone: its package imports much for training, its samplers solvers of equations."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("needs k-diffusion: pip install --no-deps k-diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    with mock.patch.dict(sys.modules, {"k_diffusion": package, "torchdiffeq": mock.Mock(), "torchsde": mock.Mock()}):
        return importlib.import_module("k_diffusion.external")


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_k_diffusions_own_wrappers(kind):
    """Their labels are linear in log sigma between the training levels, so the reference is told the same ones."""
    external = k_diffusions_external()
    network, solver = Network(), learned(5)
    wrapper = external.DiscreteEpsDDPMDenoiser if kind == "noise" else external.DiscreteVDDPMDenoiser
    alphas = torch.tensor(SD.parameters["alphas_cumprod"])
    model = wrapper(network, alphas, quantize=False)

    def function(x, t, cond):
        return network(x, model.sigma_to_t(level(SD, t).float()[None].expand(len(x))), cond)

    with torch.no_grad():
        wanted = rollout(
            Denoiser(function, SD, kind, SHAPE, network=network), noise(), solver.tableau(kind), torch.ones(2)
        )
    sigmas = model.get_sigmas(5)
    found = sample_gas(
        model, noise() / SD.alpha(1.0).float(), sigmas, {"cond": torch.ones(2)}, solver=for_sigma_space(solver)
    )
    last = float(SD.alpha(solver.t_eps))
    torch.testing.assert_close(found * last, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def test_continuous_schedules_too():
    schedule = Schedule.vp_linear()
    assert for_sigma_space(learned(3, schedule))["kind"] == "vp"
