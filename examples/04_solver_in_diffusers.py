"""The solver in diffusers.

A learned solver replaces the scheduler of a pipeline. The pipeline here is a small DiT of random weights, made and
saved by the example; the steps are the same for Stable Diffusion, SDXL, SD 3, FLUX.1, PixArt and DiT.
"""

# %% A pipeline, saved as pipelines are
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel

from gas_engine import GeneralizedSolver, load_denoiser, load_solver, rollout, save_solver
from gas_engine.denoiser import seeded
from gas_engine.export import GASScheduler

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
DiTPipeline(
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
        in_channels=4, out_channels=8, norm_num_groups=8,
    ),
    AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8),
    DDIMScheduler(),
    id2label={n: str(n) for n in range(10)},
).save_pretrained(folder / "model")  # fmt: skip

# %% [markdown]
# The model as a denoiser: schedule, prediction type and null class are read from the pipeline's own configuration. In
# earnest the solver comes from `gas-engine train`; here its numbers are moved a little from theory, so that it is one.

# %% A solver for it
denoiser = load_denoiser(folder / "model")
solver = GeneralizedSolver(steps=5, schedule=denoiser.schedule)
with torch.no_grad():
    for parameter in solver.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, dtype=torch.float64)
save_solver(solver, folder / "solver.safetensors")

# %% Into the pipeline
scheduler = GASScheduler.from_solvers([folder / "solver.safetensors"], prediction=denoiser.prediction)
scheduler.save_pretrained(folder / "scheduler")  # with gas_scheduler.py beside it, which needs diffusers alone
pipeline = DiffusionPipeline.from_pretrained(folder / "model")
pipeline.scheduler = GASScheduler.from_pretrained(folder / "scheduler")
pipeline.set_progress_bar_config(disable=True)
image = pipeline(
    [3], num_inference_steps=5, guidance_scale=1.0, generator=torch.Generator().manual_seed(7), output_type="np"
).images

# %% The same noise gives the same picture as in `rollout`
noise, _ = seeded(denoiser, [7])
with torch.no_grad():
    tableau = load_solver(folder / "solver.safetensors").tableau(denoiser.prediction)
    latents = rollout(denoiser, noise, tableau, torch.tensor([3]))
    ours = (denoiser.decoder(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
apart = float((torch.from_numpy(image) - ours).abs().max())
print(f"{tuple(ours.shape)} from 5 evaluations, {apart:.1e} apart")
assert apart < 1e-5
