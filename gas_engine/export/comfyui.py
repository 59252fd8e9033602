"""Learned few-step solvers in ComfyUI. A folder with this file as ``__init__.py``, k_diffusion.py and solvers.json goes
into ComfyUI/custom_nodes; it needs torch and ComfyUI, nothing else.

The node gives a SAMPLER and its SIGMAS for SamplerCustom; and "gas" is among the samplers of every KSampler, where the
number of steps must be one that there is a solver of, and the scheduler has no say. ComfyUI tells models of discrete
labels the nearest whole label, of the learned ones too: samples differ a little from those of other programs.
"""

import functools
from pathlib import Path

import torch

from .k_diffusion import read, sample_gas

try:
    import comfy.samplers
except ImportError:  # read outside of ComfyUI
    comfy = None  # type: ignore[assignment]

FOLDER = Path(__file__).parent
NUMBERS = FOLDER / "solvers.json"


class GASSolver:
    """The sampler of a learned solver and the noise levels of its nodes."""

    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "make"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls):
        denoise = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {"required": {"steps": (list(read(NUMBERS)["solvers"]),), "denoise": ("FLOAT", denoise)}}

    def make(self, steps, denoise):
        """``denoise`` below 1 begins at a later node: at the last int(K denoise) steps, without their history."""
        levels = read(NUMBERS)["solvers"][str(steps)]["sigmas"][:-1]
        begin = len(levels) - int(len(levels) * denoise)
        sampler = comfy.samplers.KSAMPLER(functools.partial(sample_gas, solver=NUMBERS))
        # At the end the sample itself: ComfyUI divides what it gets by the signal that a last level above 0 leaves.
        return sampler, torch.tensor([*levels[begin:], 0.0])


def register():
    """Put "gas" among the samplers; a second folder's goes by the name of the folder."""
    samplers = comfy.samplers.KSampler.SAMPLERS
    name = "gas" if "gas" not in samplers else f"gas_{FOLDER.name}"
    if name not in samplers:
        setattr(comfy.samplers.k_diffusion_sampling, f"sample_{name}", functools.partial(sample_gas, solver=NUMBERS))
        samplers.append(name)


NODE_CLASS_MAPPINGS = {f"GASSolver {FOLDER.name}": GASSolver}
NODE_DISPLAY_NAME_MAPPINGS = {name: f"Learned solver ({FOLDER.name})" for name in NODE_CLASS_MAPPINGS}

if comfy is not None:
    register()
