"""The folder for ComfyUI against the interface that it meets there, with a stand-in for comfy."""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import pytest
import torch
from test_export import KINDS, SD, Network, denoiser, learned, noise
from test_export_k_diffusion import wrapped

from gas_engine import convert, rollout, save_solver
from gas_engine.export import sample_gas


class KSAMPLER:
    """As comfy.samplers.KSAMPLER: noise becomes a state of the model's scaling, the function runs, and back."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model, sigmas, extra_args, callback, noise, latent_image, flow, sigma_max):
        first, last = float(sigmas[0]), float(sigmas[-1])
        if flow:
            x = first * noise + (1 - first) * latent_image
        else:
            full = math.isclose(sigma_max, first, rel_tol=1e-5) or first > sigma_max
            x = noise * (math.sqrt(1 + first**2) if full else first) + latent_image
        x = self.sampler_function(
            model, x, sigmas, extra_args=extra_args, callback=callback, disable=True, **self.extra_options
        )
        return x / (1 - last) if flow else x


@pytest.fixture
def comfy(monkeypatch):
    package, samplers = types.ModuleType("comfy"), types.ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSAMPLER
    samplers.KSampler = type("KSampler", (), {"SAMPLERS": ["euler", "uni_pc"]})
    samplers.k_diffusion_sampling = types.ModuleType("comfy.k_diffusion.sampling")
    package.samplers = samplers
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    return samplers


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Convert solvers and import the folder as ComfyUI does, by its path, without gas_engine."""

    def installed(name, *solvers):
        for solver in solvers:
            save_solver(solver, tmp_path / f"k{solver.steps}.safetensors", model="small")
        files = [str(tmp_path / f"k{solver.steps}.safetensors") for solver in solvers]
        folder = tmp_path / "custom_nodes" / name
        convert.main([*files, "--to", "comfyui", "--out", str(folder)])
        assert sorted(p.name for p in folder.iterdir()) == ["__init__.py", "k_diffusion.py", "solvers.json"]
        spec = importlib.util.spec_from_file_location(f"nodes_{name}", folder / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"nodes_{name}", module)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "gas_engine", None)
            spec.loader.exec_module(module)
        return module

    return installed


@pytest.mark.parametrize("prediction", ["noise", "flow"])
def test_the_node_samples_as_rollout_does(prediction, comfy, install):
    schedule, model = KINDS[prediction], denoiser(prediction, Network())
    solver = learned(4, schedule)
    module = install("gas_solver", solver, learned(6, schedule))
    (node,) = module.NODE_CLASS_MAPPINGS.values()
    assert node.INPUT_TYPES()["required"]["steps"] == (["4", "6"],)
    assert node.RETURN_TYPES == ("SAMPLER", "SIGMAS") and hasattr(node, node.FUNCTION)
    sampler, sigmas = getattr(node(), node.FUNCTION)(steps="4", denoise=1.0)
    flow, seen = prediction == "flow", []
    assert len(sigmas) == 5 and float(sigmas[-1]) == 0 and bool((sigmas[1:] < sigmas[:-1]).all())
    found = sampler.sample(
        wrapped(model), sigmas, {"cond": torch.ones(2)}, seen.append, noise(), torch.zeros_like(noise()), flow,
        1.0 if flow else 14.6146,
    )  # fmt: skip
    with torch.no_grad():
        wanted = rollout(model, noise(), solver.tableau(prediction), torch.ones(2))
    last = 1.0 if flow else float(schedule.alpha(solver.t_eps))
    torch.testing.assert_close(found * last, wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.abs().max())))
    assert [row["i"] for row in seen] == [0, 1, 2, 3]


def test_denoise_begins_at_a_later_node(comfy, install):
    (node,) = install("gas_solver", learned(6)).NODE_CLASS_MAPPINGS.values()
    model = wrapped(denoiser("noise", Network()), calls := [])
    for denoise, steps in ((0.5, 3), (0.34, 2), (0.99, 5), (0.0, 0)):
        sampler, sigmas = node().make("6", denoise)
        assert len(sigmas) == steps + 1
        calls.clear()
        x = sampler.sampler_function(model, noise(), sigmas, extra_args={"cond": torch.ones(2)})
        assert calls == pytest.approx(sigmas[:-1].tolist()) and bool(x.isfinite().all())


def test_gas_is_among_the_samplers(comfy, install):
    install("gas_solver", learned(4))
    assert comfy.KSampler.SAMPLERS == ["euler", "uni_pc", "gas"]
    sampler = comfy.k_diffusion_sampling.sample_gas  # as comfy.samplers.ksampler("gas") finds it
    model, x = wrapped(denoiser("noise", Network())), 14.6146 * noise()
    sigmas = torch.tensor([14.6146, 9.0, 4.0, 1.0, 0.0])  # any scheduler's
    found = sampler(model, x, sigmas, extra_args={"cond": torch.ones(2)}, callback=None, disable=False)
    from gas_engine.export import for_sigma_space

    wanted = sample_gas(model, x, sigmas, {"cond": torch.ones(2)}, solver=for_sigma_space(learned(4)))
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="the number of steps must be one of 4"):
        sampler(model, x, torch.linspace(14.6146, 0, 21), extra_args={"cond": torch.ones(2)})
    other = install("gas_sdxl", learned(4))
    assert comfy.KSampler.SAMPLERS[-1] == "gas_gas_sdxl" and "gas_sdxl" in next(iter(other.NODE_CLASS_MAPPINGS))


def test_it_can_be_read_without_comfyui():
    from gas_engine.export import comfyui

    assert comfyui.NODE_CLASS_MAPPINGS and SD.kind == "vp_discrete"
