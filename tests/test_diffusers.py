"""Pipelines that diffusers saved, as denoisers: against diffusers' own networks and loops of its schedulers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from torch import Tensor

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, Schedule, rollout
from gas_engine.adapters.diffusers import load_diffusers
from gas_engine.costs import Probe
from gas_engine.execution import Execution
from gas_engine.planner import plan
from gas_engine.solvers import classical
from gas_engine.solvers.named import named_solver

FAMILIES = tuple(pipelines.PIPELINES)
E = pipelines.WIDTH
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def opened(saved: Saved) -> Callable[[str], Denoiser]:
    kept: dict[str, Denoiser] = {}

    def denoiser(name: str) -> Denoiser:
        if name not in kept:
            kept[name] = load_diffusers(str(saved(name)), resolution=16)
        return kept[name]

    return denoiser


def cond_of(name: str, batch: int = 2) -> Any:
    generator = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    if name == "dit":
        return torch.arange(batch) + 7
    if name == "pixart":
        return {"text": numbers(6, E), "mask": (torch.arange(6) < 4).long().expand(batch, 6).clone()}
    text = {"text": numbers(6, 2 * E if name in ("sdxl", "sd3") else E)}
    if name in ("sd15", "sd21v"):
        return text
    pooled = {"pooled": numbers(2 * E if name == "sd3" else E)}
    if name == "sdxl":
        return text | pooled | {"time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(batch, 6)}
    return text | pooled | ({"guidance": torch.full((batch,), 3.5)} if name == "flux" else {})


def own_call(pipe: Any, name: str, x: Tensor, label: int, cond: Any) -> Tensor:
    """The network as its pipeline calls it."""
    labels = torch.full((len(x),), label)
    if name in ("sd15", "sd21v"):
        return pipe.unet(x, label, encoder_hidden_states=cond["text"]).sample
    if name == "sdxl":
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        return pipe.unet(x, label, encoder_hidden_states=cond["text"], added_cond_kwargs=added).sample
    if name == "dit":
        return pipe.transformer(x, timestep=labels, class_labels=cond).sample.chunk(2, 1)[0]
    if name == "pixart":
        return pipe.transformer(
            x, encoder_hidden_states=cond["text"], encoder_attention_mask=cond["mask"], timestep=labels,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.chunk(2, 1)[0]  # fmt: skip
    if name == "sd3":
        return pipe.transformer(
            hidden_states=x, timestep=labels.float(), encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
        ).sample  # fmt: skip
    rows, columns = x.shape[2:]
    output = pipe.transformer(
        hidden_states=pipe._pack_latents(x, *x.shape), timestep=labels.float() / 1000, guidance=cond.get("guidance"),
        pooled_projections=cond["pooled"], encoder_hidden_states=cond["text"],
        txt_ids=torch.zeros(cond["text"].shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(len(x), rows // 2, columns // 2, "cpu", torch.float32),
    ).sample  # fmt: skip
    scale = pipe.vae_scale_factor
    return pipe._unpack_latents(output, scale * rows, scale * columns, scale)


def time_of(schedule: Schedule, label: float) -> Tensor:
    """The time at which the network is told this label."""
    if schedule.kind != "flow":
        return torch.tensor((label + 1) / 1000, dtype=torch.float64)
    sigma, shift = torch.tensor(label / 1000, dtype=torch.float64), schedule.parameters["shift"]
    return sigma / (shift - (shift - 1) * sigma)


def state(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_pipelines_own_call(opened: Callable[[str], Denoiser], name: str) -> None:
    denoiser, pipe, x, cond = opened(name), pipelines.build(name), state(), cond_of(name)
    assert denoiser.shape == (4, 8, 8) and not any(p.requires_grad for p in denoiser.parameters())
    for label in (250, 500, 750):  # which FLUX's own division and multiplication by 1000 leave as they are
        with torch.no_grad():
            ours = denoiser(x, time_of(denoiser.schedule, label), cond)
            theirs = own_call(pipe, name, x, label, cond)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_derivatives_in_t_and_x(opened: Callable[[str], Denoiser], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd in float32, against finite differences in float64 with sines in float64 (diffusers has float32)."""
    from diffusers.models import embeddings

    def sines(timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=10000):
        half = embedding_dim // 2
        frequencies = max_period ** (-torch.arange(half, dtype=torch.float64) / (half - downscale_freq_shift))
        angles = scale * timesteps[:, None].double() * frequencies
        parts = [angles.sin(), angles.cos()]
        return torch.cat(parts[::-1] if flip_sin_to_cos else parts, 1)

    denoiser, cond = opened(name), cond_of(name)
    weight = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    x, t = state(), time_of(denoiser.schedule, 611.3)
    leaves = x.clone().requires_grad_(), t.clone().requires_grad_()
    gradient_x, slope = torch.autograd.grad((denoiser(*leaves, cond).double() * weight).sum(), leaves)
    monkeypatch.setattr(embeddings, "get_timestep_embedding", sines)
    exact, h = copy.deepcopy(denoiser).double(), 1e-5

    def value(x: Tensor, t: Tensor) -> float:
        with torch.no_grad():
            return float((exact(x, t, cond) * weight).sum())

    x = x.double()
    difference = (value(x, t + h) - value(x, t - h)) / (2 * h)
    assert abs(float(slope) - difference) < 1e-3 * abs(difference), (float(slope), difference)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    difference = (value(x + h * direction, t) - value(x - h * direction, t)) / (2 * h)
    assert abs(float((gradient_x * direction).sum()) - difference) < 1e-4 * abs(difference) + 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_keep_their_fraction_in_bfloat16(opened: Callable[[str], Denoiser], name: str) -> None:
    """What the sines are made of is the label to float32's digits, and a shift of 0.2 at 900 is answered."""
    denoiser, x, cond = opened(name), state(16), cond_of(name, 16)
    narrow = Execution(precision="bf16").place(denoiser, "cpu")
    assert narrow.function.network.dtype == torch.bfloat16
    seen: list[Tensor] = []
    embedders = [module for key, module in narrow.named_modules() if key.endswith("time_proj")]
    hooks = [m.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for m in embedders]
    outputs = []
    for network in (denoiser, narrow):
        with torch.no_grad():
            outputs.append([network(x, time_of(denoiser.schedule, label), cond).float() for label in (900.0, 900.2)])
    for hook in hooks:
        hook.remove()
    labels = [label for label in seen if label.ndim and 800 < label[0] < 1000]
    assert {round(float(label[0]), 3) for label in labels} == {900.0, 900.2}
    assert all(label.dtype in (torch.float32, torch.float64) for label in labels)
    exact, answered = (b - a for a, b in outputs)
    # Each output is off by its own rounding; along the exact response that averages out.
    assert 0.7 < float((exact * answered).sum() / exact.square().sum()) < 1.3


@pytest.mark.parametrize("name", FAMILIES)
def test_views_equal_the_network(opened: Callable[[str], Denoiser], name: str) -> None:
    denoiser, cond = opened(name), cond_of(name)
    results = []
    for way in (Execution(), Execution(lean=True), Execution(blocks="all"), Execution(lean=True, blocks="auto")):
        x, t = state().requires_grad_(), time_of(denoiser.schedule, 432.1).requires_grad_()
        y = way.view(denoiser)(x, t, cond)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, t))))
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["sd15", "sd21v"])
def test_ddim_is_the_pipelines(opened: Callable[[str], Denoiser], name: str) -> None:
    """diffusers' label n is our time (n + 1) / N; its last step ends at label 0, at time 1/N."""
    from diffusers import DDIMScheduler

    pipe, denoiser, x, cond = pipelines.build(name), opened(name), state(), cond_of(name)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt_embeds=cond["text"], latents=x, num_inference_steps=8, guidance_scale=1.0, output_type="latent",
        return_dict=False,
    )[0]  # fmt: skip
    labels = [*pipe.scheduler.timesteps.tolist(), 0]
    assert labels[0] == 876 and labels[-2] == 1
    times = torch.stack([time_of(denoiser.schedule, label) for label in labels])
    ours = rollout(denoiser, x, classical.ddim(denoiser.schedule, times), cond)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["sd3", "flux", "flux_schnell"])
def test_euler_is_the_flow_pipelines(opened: Callable[[str], Denoiser], name: str) -> None:
    """The shift, by size for FLUX.1-dev, is the scheduler's: our times are the sigmas that it is given."""
    pipe, denoiser, x, cond = pipelines.build(name), opened(name), state(), cond_of(name)
    pipe.set_progress_bar_config(disable=True)
    sigmas = torch.linspace(1, 1 / 6, 6, dtype=torch.float64)
    said = {"prompt_embeds": cond["text"], "pooled_prompt_embeds": cond["pooled"], "sigmas": sigmas.tolist()}
    said |= {"output_type": "latent", "return_dict": False, "height": 16, "width": 16, "num_inference_steps": 6}
    if name == "sd3":
        theirs = pipe(**said, latents=x, guidance_scale=1.0)[0]
    else:
        packed = pipe(**said, latents=pipe._pack_latents(x, *x.shape), guidance_scale=3.5)[0]
        theirs = pipe._unpack_latents(packed, 16, 16, pipe.vae_scale_factor)
    times = torch.cat([sigmas, sigmas.new_tensor([1e-8])])
    times[0] = denoiser.schedule.t_start
    ours = rollout(denoiser, x, classical.ddim(denoiser.schedule, times), cond)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_teachers_agree_in_flow_time(opened: Callable[[str], Denoiser]) -> None:
    denoiser, x, cond = opened("sd3"), state(1), cond_of("sd3", 1)

    def sample(solver: str, steps: int) -> Tensor:
        return rollout(denoiser, x, named_solver(solver, denoiser.schedule, steps, "uniform", 1e-3), cond)

    fine = sample("dpmpp3m", 96)
    errors = {
        solver: float((sample(solver, 32) - fine).norm() / fine.norm()) for solver in ("euler", "heun", "dpmpp2m")
    }
    assert max(errors.values()) < 0.02 and errors["dpmpp2m"] < errors["euler"]


def test_the_generalized_solver_learns_on_a_flow(opened: Callable[[str], Denoiser]) -> None:
    denoiser, x, cond = opened("sd3"), state(4), cond_of("sd3", 4)
    target = rollout(denoiser, x, named_solver("heun", denoiser.schedule, 24, "uniform"), cond)
    solver = GeneralizedSolver(steps=4, schedule=denoiser.schedule)
    solver.xi.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in solver.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (rollout(denoiser, x, solver.tableau("flow"), cond, MemoryPolicy(1)) - target).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


def test_a_plan_for_it(opened: Callable[[str], Denoiser]) -> None:
    denoiser = opened("flux")
    choice = plan(denoiser, 2, 4, "1GiB", cond=cond_of("flux", 1), blocks=("none",)).choice
    assert choice.feasible and choice.weight_bytes >= sum(p.nbytes for p in denoiser.parameters())


@pytest.mark.parametrize("name", ["sdxl", "dit", "pixart"])
def test_what_a_call_costs(opened: Callable[[str], Denoiser], name: str) -> None:
    """In fake tensors, with text, sizes, masks and classes."""
    probe = Probe(opened(name), cond_of(name, 1))
    plain, lean = (probe.cost(lean_ops, "none", 2) for lean_ops in (False, True))
    assert lean.kept < plain.kept and plain.output >= 2 * 4 * 8 * 8 * 4
