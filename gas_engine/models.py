"""The model that a verb works on, from its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ._cli import InputError
from .adapters import load_denoiser
from .conditioning import Range
from .denoiser import Denoiser
from .execution import DTYPES, Execution, Precision, Weights
from .guidance import guided, parse_guidance


@dataclass
class ModelOptions:
    """Which model, and what it is told."""

    model: str = "digits"
    """The embedded digits, digits-guided or photos; an EDM network (.pkl, .safetensors); an LDM checkpoint (.ckpt with
    its .yaml); a diffusers pipeline (a directory or a Hub id); or module:factory."""
    prompts: str | None = None
    """Of a text model: a file of prompts (a line each, COCO's captions, .jsonl, .csv), or the prompt itself."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    guidance: str | None = None
    """Scale of classifier-free guidance, such as 7.5; or a range such as 2:9: its ends and their middle in
    log(1 + scale), each for every third seed."""
    resolution: int | None = None
    """Pixels a side of the pictures of a pipeline or an EDM network; its own unless given."""
    text_length: int | None = None
    """Tokens of a text for a T5 encoder (SD 3, FLUX, PixArt); the pipeline's own number unless given."""


@dataclass
class PlacedModelOptions(ModelOptions):
    """How its weights are held, beside."""

    weights: Weights = "resident"
    """Frozen weights on the device, in eight or four bits there, or in host memory, brought block by block."""
    quantize: Literal["int8", "nf4"] | None = None
    """Short for --weights int8 and --weights nf4."""
    precision: Precision = "fp32"
    """Of the network's weights and arithmetic; states and times keep theirs. fp32 is as the model has them."""

    def __post_init__(self) -> None:
        if self.quantize is None:
            return
        if self.weights not in ("resident", self.quantize):
            raise InputError(f"--quantize {self.quantize} and --weights {self.weights} are two; leave one out")
        self.weights, self.quantize = self.quantize, None


def open_model(options: ModelOptions, default_prompts: str | list[str] | None = None) -> Denoiser:
    """The model on the host, conditioned and guided. Raises ValueError for options that it has no use for."""
    precision = getattr(options, "precision", "fp32")
    dtype = None if precision == "fp32" else DTYPES[precision]  # a large network never lies on the host in fp32
    denoiser = load_denoiser(options.model, options.resolution, text_length=options.text_length, dtype=dtype)
    conditioning, scale = denoiser.conditioning, parse_guidance(options.guidance) if options.guidance else None
    if conditioning is not None and conditioning.takes_prompts:
        prompts = options.prompts or (None if conditioning.classes else default_prompts)
        denoiser.conditioning = conditioning.told(prompts, options.negative_prompt, scale)
    elif options.prompts is not None or options.negative_prompt:
        raise InputError(f"--prompts was given, but {denoiser.name} takes no text; leave it out")
    return _guided(denoiser, scale)


def _guided(denoiser: Denoiser, scale: float | Range | None) -> Denoiser:
    conditioning = denoiser.conditioning
    if scale is None or scale == 1.0:
        return denoiser
    if conditioning is not None and conditioning.guidance_input:
        denoiser.guidance = scale
        return denoiser
    if conditioning is None or conditioning.null is None:
        raise InputError(
            f"--guidance {scale} needs a condition that says nothing, and {denoiser.name} was trained without one; "
            "leave it out"
        )
    return guided(denoiser, scale, conditioning.null)


def place(options: PlacedModelOptions, denoiser: Denoiser, device: torch.device) -> Denoiser:
    """The model on the device, its weights as the options say."""
    return Execution(weights=options.weights, precision=options.precision).place(denoiser, device)
