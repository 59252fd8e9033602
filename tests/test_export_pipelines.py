"""GASScheduler in diffusers' own pipelines: the same latents as rollout, image to image, and reloading."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipelines import saved  # noqa: F401 (a fixture)
from test_export import learned

from gas_engine import rollout
from gas_engine.denoiser import seeded
from gas_engine.models import ModelOptions, open_model
from gas_engine.solvers import classical

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
from gas_engine.export import GASScheduler  # noqa: E402

PROMPT, STEPS = "a photo of a cat", 4


@functools.cache
def pipeline(path):
    found = diffusers.DiffusionPipeline.from_pretrained(path)
    found.set_progress_bar_config(disable=True)
    return found


def solver_for(denoiser, steps=STEPS):
    return learned(steps, denoiser.schedule, scale=0.02)


def opened(path, guidance, prompts=PROMPT):
    """The denoiser of a saved pipeline, told the prompt and guided."""
    side = None if prompts != PROMPT else 16
    return open_model(ModelOptions(model=str(path), prompts=prompts, guidance=str(guidance), resolution=side))


def close(found, wanted):
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("name", ["sd15", "sd21v", "sdxl", "sd3", "pixart"])
def test_text_to_image(name, guidance, saved):  # noqa: F811
    path = saved(name)
    denoiser = opened(path, guidance)
    solver = solver_for(denoiser)
    noise, cond = seeded(denoiser, [0])
    with torch.no_grad():
        wanted = rollout(denoiser, noise, solver.tableau(denoiser.prediction), cond)
    pipe = pipeline(path)
    pipe.scheduler = GASScheduler.from_solvers(solver, denoiser.prediction)
    side = noise.shape[-1] * 2
    options = {"use_resolution_binning": False} if name == "pixart" else {}
    found = pipe(
        PROMPT, height=side, width=side, num_inference_steps=STEPS, guidance_scale=guidance, latents=noise,
        output_type="latent", **options,
    ).images  # fmt: skip
    close(torch.as_tensor(found), wanted)


@pytest.mark.parametrize("name", ["flux", "flux_schnell"])
def test_flux(name, saved):  # noqa: F811
    path = saved(name)
    denoiser = opened(path, 3.5 if name == "flux" else 1.0)
    solver = solver_for(denoiser)
    noise, cond = seeded(denoiser, [0])
    with torch.no_grad():
        wanted = rollout(denoiser, noise, solver.tableau("flow"), cond)
    pipe = pipeline(path)
    pipe.scheduler = GASScheduler.from_solvers(solver, "flow")
    _, channels, rows, columns = noise.shape
    found = pipe(
        PROMPT, height=2 * rows, width=2 * columns, num_inference_steps=STEPS, guidance_scale=3.5,
        latents=pipe._pack_latents(noise, 1, channels, rows, columns), output_type="latent",
    ).images  # fmt: skip
    close(pipe._unpack_latents(found, 2 * rows, 2 * columns, pipe.vae_scale_factor), wanted)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dit(guidance, saved, monkeypatch):  # noqa: F811
    """It draws its latents itself, and keeps two copies of each when it is guided."""
    path = saved("dit")
    denoiser = opened(path, guidance, prompts="goldfish")
    solver = solver_for(denoiser)
    noise, cond = seeded(denoiser, [0, 1])
    with torch.no_grad():
        wanted = rollout(denoiser, noise, solver.tableau("noise"), cond)
    pipe = pipeline(path)
    pipe.scheduler = GASScheduler.from_solvers(solver, "noise")
    seen = []
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(pipe.vae, "decode", lambda z: seen.append(z) or SimpleNamespace(sample=z[:, :3]))
    pipe([1, 1], guidance_scale=guidance, num_inference_steps=STEPS)
    close(seen[0] * pipe.vae.config.scaling_factor, wanted)


def test_one_step_of_pixart(saved):  # noqa: F811
    """Its one-step pipelines take another entry of the tuple."""
    pipe = pipeline(saved("pixart"))
    pipe.scheduler = GASScheduler.from_solvers(learned(1, opened(saved("pixart"), 1.0).schedule), "noise")
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "use_resolution_binning": False}
    assert bool(pipe(PROMPT, height=16, width=16, output_type="latent", **options).images.isfinite().all())


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_image_to_image(name, saved):  # noqa: F811
    """DPM-Solver++(2M) over the learned nodes from the one where the pipeline begins."""
    path = saved(name)
    denoiser = opened(path, 3.5 if name == "flux" else 1.0)
    solver = solver_for(denoiser, 5)
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline(path))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = GASScheduler.from_solvers(solver, denoiser.prediction)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    seen = []

    def watch(pipe, i, t, kwargs):
        seen.append(float(t))
        return kwargs

    begin, add = [], pipe.scheduler.add_noise
    pipe.scheduler.add_noise = lambda *args: begin.append(add(*args)) or begin[-1]
    scale = 3.5 if name == "flux" else 1.0
    found = pipe(
        PROMPT, image=image, height=16, width=16, strength=0.6, num_inference_steps=5, guidance_scale=scale,
        generator=torch.Generator().manual_seed(0), output_type="latent", callback_on_step_end=watch,
    ).images  # fmt: skip
    start = begin[0]
    if name == "flux":
        found = pipe._unpack_latents(found, 16, 16, pipe.vae_scale_factor)
    nodes = solver.times().detach()[2:]
    plain = classical.dpmpp(denoiser.schedule, nodes, 2)
    with torch.no_grad():
        close(found, rollout(denoiser, start, plain, seeded(denoiser, [0])[1]))
    count = len(denoiser.schedule.parameters.get("alphas_cumprod", range(1000)))
    levels = denoiser.schedule.sigma(nodes[:-1]) * 1000 if denoiser.prediction == "flow" else nodes[:-1] * count - 1
    assert seen == pytest.approx(levels.tolist(), rel=1e-6, abs=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_keeps_what_the_mask_does_not_cover(strength, saved):  # noqa: F811
    path = saved("sd15")
    pipe = diffusers.AutoPipelineForInpainting.from_pipe(pipeline(path))
    pipe.set_progress_bar_config(disable=True)
    denoiser = opened(path, 1.0)
    solver = solver_for(denoiser, 5)
    pipe.scheduler = GASScheduler.from_solvers(solver, "noise")
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    kept, add = [], pipe.scheduler.add_noise
    pipe.scheduler.add_noise = lambda sample, *args: kept.append(sample) or add(sample, *args)
    found = pipe(
        PROMPT, image=image, mask_image=mask, height=16, width=16, strength=strength, num_inference_steps=5,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images  # fmt: skip
    assert bool(found.isfinite().all()) and not torch.equal(found[..., 4:], kept[0][..., 4:])
    assert torch.equal(found[..., :4], kept[0][..., :4])


def test_a_refiner_takes_over(saved):  # noqa: F811
    """SDXL's base stops at a fraction of the labels, where its refiner begins: learned rows, then those of theory."""
    pipe = pipeline(saved("sdxl"))
    denoiser = opened(saved("sdxl"), 1.0)
    solver = solver_for(denoiser, 6)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    refiner.set_progress_bar_config(disable=True)
    pipe.scheduler, refiner.scheduler = (GASScheduler.from_solvers(solver, "noise") for _ in range(2))
    options = {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "latent"}
    noise, cond = seeded(denoiser, [0])
    base = pipe(PROMPT, height=16, width=16, latents=noise, denoising_end=0.5, **options).images
    taken = pipe.scheduler.step_index
    assert 0 < taken < 6
    states = {}
    with torch.no_grad():
        rollout(denoiser, noise, solver.tableau("noise"), cond, on_step=states.__setitem__)
        close(base, states[taken])
        rest = classical.dpmpp(denoiser.schedule, solver.times()[taken:], 2)
        wanted = rollout(denoiser, base, rest, cond)
    found = refiner(
        PROMPT, image=base, denoising_start=0.5, original_size=(16, 16), target_size=(16, 16), **options
    ).images
    assert refiner.scheduler.begin_index == taken
    close(found, wanted)


def test_a_pipeline_saves_and_loads_with_its_scheduler(saved, tmp_path):  # noqa: F811
    """scheduler/gas_scheduler.py goes with it: whoever trusts the directory needs no gas_engine."""
    path = saved("sd15")
    denoiser = opened(path, 1.0)
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    pipe.scheduler = GASScheduler.from_solvers(solver_for(denoiser), "noise")
    pipe.save_pretrained(tmp_path)
    assert pipe.config.scheduler == ("gas_scheduler", "GASScheduler")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    own = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, scheduler=GASScheduler.from_pretrained(tmp_path / "scheduler")
    )
    assert type(again.scheduler).__name__ == "GASScheduler" and type(again.scheduler) is not GASScheduler
    noise, _ = seeded(denoiser, [0])
    pictures = []
    for each in (pipe, again, own):
        each.set_progress_bar_config(disable=True)
        pictures.append(
            each(PROMPT, height=16, width=16, num_inference_steps=STEPS, latents=noise, output_type="np").images
        )
    for other in pictures[1:]:
        np.testing.assert_allclose(other, pictures[0], rtol=0, atol=1e-5)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "scheduler" / "gas_scheduler.py").exists()


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_half_precision(name, saved):  # noqa: F811
    path = saved(name)
    denoiser = opened(path, 3.5 if name == "flux" else 1.0)
    pipe = diffusers.DiffusionPipeline.from_pretrained(path).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = GASScheduler.from_solvers(solver_for(denoiser), denoiser.prediction)
    found = pipe(PROMPT, height=16, width=16, num_inference_steps=STEPS, output_type="latent").images
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())
