"""Published networks as data: what a memory plan needs of a model before its weights are downloaded.

| name      | network                             | parameters | state         | told by         |
|-----------|-------------------------------------|-----------:|---------------|-----------------|
| cifar10   | EDM DDPM++ (arXiv 2206.00364)       |     55.7 M | 3 x 32 x 32   |                 |
| ffhq64    | EDM DDPM++                          |     61.8 M | 3 x 64 x 64   |                 |
| adm64     | ADM of EDM, ImageNet                |    295.9 M | 3 x 64 x 64   | class           |
| ldm4      | LDM-4, ImageNet 256 (2112.10752)    |    401.4 M | 3 x 64 x 64   | class, guidance |
| dit-xl2   | DiT-XL/2, ImageNet 256 (2212.09748) |    674.8 M | 4 x 32 x 32   | class, guidance |
| sd15      | Stable Diffusion 1.5                |    859.5 M | 4 x 64 x 64   | text, guidance  |
| sdxl      | Stable Diffusion XL (2307.01952)    |  2,567.5 M | 4 x 128 x 128 | text, guidance  |
| sd3       | Stable Diffusion 3 medium           |  2,028.3 M | 16 x 128 x 128| text, guidance  |
| flux      | FLUX.1-dev                          | 11,901.4 M | 16 x 128 x 128| text            |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, EDMDenoiser
from ..networks import build_edm
from ..schedule import Schedule
from .wrappers import (
    ClassTransformer,
    ClassUNet,
    DiffusersFunction,
    PackedTransformer,
    TextSizeUNet,
    TextTransformer,
    TextUNet,
    network_label,
)

__all__ = ["ARCHITECTURES", "Architecture", "DiffusersFunction", "PackedTransformer", "architecture", "network_label"]


@dataclass(frozen=True)
class Architecture:
    """A published network without its weights.

    ``arguments`` are its constructor's, as published; ``small`` overrides them for a network of the same structure
    that a CPU runs in milliseconds. ``shape``, ``small_shape`` [C, H, W] of a state; ``classes``, ``tokens`` (of text;
    full and small) say what conditions it; ``guided``: it is used with classifier-free guidance; ``dtype`` is the usual
    one of its weights. ``wrapper`` None is an EDM network.

        with FakeTensorMode(allow_non_fake_inputs=True):
            denoiser = architecture("flux").denoiser()  # 22 GiB of weights, none of them there
    """

    name: str
    title: str
    arguments: Mapping[str, Any]
    small: Mapping[str, Any]
    shape: tuple[int, ...]
    small_shape: tuple[int, ...]
    schedule: Schedule
    prediction: str
    wrapper: type[DiffusersFunction] | None = None
    classes: int | None = None
    tokens: tuple[int, int] = (0, 0)
    guided: bool = False
    dtype: torch.dtype = torch.float32
    precond: str = field(default="EDMPrecond", repr=False)

    def denoiser(self, small: bool = False) -> Denoiser:
        """The network, frozen, in eval mode, with random float32 weights; under FakeTensorMode it takes no memory.

        Raises ValueError if it needs diffusers, which is not installed.
        """
        arguments = self._arguments(small)
        name = f"{self.name}-small" if small else self.name
        if self.wrapper is None:
            return EDMDenoiser(build_edm(arguments, precond=self.precond), name=name).requires_grad_(False)
        function = self.wrapper(arguments, self.schedule)
        shape = self.small_shape if small else self.shape
        return Denoiser(function, self.schedule, self.prediction, shape, classes=self.classes, name=name)

    def cond(self, batch: int, small: bool = False) -> Any:
        """Conditions of the right shapes, [batch, ...]: class indices, a dict of tensors, or None."""
        return self._cond(batch, small, null=False)

    def null_cond(self, batch: int = 1, small: bool = False) -> Any:
        """The condition that says nothing, for guidance: the class after the last one, or zeros for text."""
        return self._cond(batch, small, null=True) if self.guided else None

    def _cond(self, batch: int, small: bool, null: bool) -> Any:
        shapes = None
        if self.wrapper is not None:
            shapes = self.wrapper.conditions(self._arguments(small), self.tokens[small])
        if shapes is not None:
            fill = torch.zeros if null else torch.randn
            said: dict[str, Tensor] = {key: fill(batch, *shape) for key, shape in shapes.items()}
            if "guidance" in said:
                said["guidance"] = torch.full((batch,), 3.5)
            return said
        if self.classes is None:
            return None
        return torch.full((batch,), self.classes) if null else torch.arange(batch) % self.classes

    def _arguments(self, small: bool) -> dict[str, Any]:
        return {**self.arguments, **(self.small if small else {})}


def architecture(name: str) -> Architecture:
    """A bundled architecture by name. Raises ValueError, with the names that there are, for another."""
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _discrete(beta_0: float, beta_1: float, power: float) -> Schedule:
    """1000 betas, evenly spaced in beta^(1/power)."""
    ends = (beta_0 ** (1 / power), beta_1 ** (1 / power))
    betas = torch.linspace(*ends, 1000, dtype=torch.float64) ** power
    return Schedule.vp_discrete(torch.cumprod(1 - betas, 0))


_SONG: dict[str, Any] = {
    "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "embedding_type": "positional",
    "encoder_type": "standard", "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1],
    "model_channels": 128, "augment_dim": 9,
}  # fmt: skip
_SMALL_EDM = {"img_resolution": 16, "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1}
_UNET: dict[str, Any] = {
    "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32,
}  # fmt: skip
_FOUR_LEVELS = {
    "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32,
    "sample_size": 16,
}  # fmt: skip
_SD_SCHEDULE = _discrete(0.00085, 0.012, 2)

ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture(
            "cifar10", "EDM DDPM++, CIFAR-10",
            {**_SONG, "img_resolution": 32, "channel_mult": [2, 2, 2], "dropout": 0.13},
            {**_SMALL_EDM, "attn_resolutions": [8]},
            (3, 32, 32), (3, 16, 16), Schedule.edm(), "data",
        ),
        Architecture(
            "ffhq64", "EDM DDPM++, FFHQ-64",
            {**_SONG, "img_resolution": 64, "channel_mult": [1, 2, 2, 2], "dropout": 0.05},
            {**_SMALL_EDM, "channel_mult": [1, 2, 2], "attn_resolutions": [8]},
            (3, 64, 64), (3, 16, 16), Schedule.edm(), "data",
        ),
        Architecture(
            "adm64", "EDM ADM, ImageNet-64",
            {
                "img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet",
                "model_channels": 192, "channel_mult": [1, 2, 3, 4],
            },
            {**_SMALL_EDM, "attn_resolutions": [8]},
            (3, 64, 64), (3, 16, 16), Schedule.edm(), "data", classes=1000,
        ),
        Architecture(
            "ldm4", "LDM-4, ImageNet 256",
            {
                **_UNET, "sample_size": 64, "in_channels": 3, "out_channels": 3, "cross_attention_dim": 512,
                "block_out_channels": (192, 384, 576, 960),
                "attention_head_dim": 1,  # their number
                "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
                "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            },
            {**_FOUR_LEVELS, "attention_head_dim": (1, 1, 2, 2)},
            (3, 64, 64), (3, 16, 16), _discrete(0.0015, 0.0195, 2), "noise", ClassUNet, classes=1000, guided=True,
        ),
        Architecture(
            "dit-xl2", "DiT-XL/2, ImageNet 256",
            {
                "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
                "num_layers": 28, "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True, "sample_size": 32,
                "patch_size": 2, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
                "upcast_attention": False, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
                "norm_eps": 1e-5,
            },
            {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 16},
            (4, 32, 32), (4, 16, 16), _discrete(1e-4, 2e-2, 1), "noise", ClassTransformer, classes=1000, guided=True,
        ),
        Architecture(
            "sd15", "Stable Diffusion 1.5",
            {
                **_UNET, "sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768,
                "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8,
                "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
                "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            },
            {**_FOUR_LEVELS, "attention_head_dim": 2},
            (4, 64, 64), (4, 16, 16), _SD_SCHEDULE, "noise", TextUNet, tokens=(77, 7), guided=True,
            dtype=torch.bfloat16,
        ),
        Architecture(
            "sdxl", "Stable Diffusion XL",
            {
                **_UNET, "sample_size": 128, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 2048,
                "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
                "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
                "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
                "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            },
            {
                **_FOUR_LEVELS, "block_out_channels": (32, 32, 64), "attention_head_dim": (1, 1, 2),
                "transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            (4, 128, 128), (4, 16, 16), _SD_SCHEDULE, "noise", TextSizeUNet, tokens=(77, 7), guided=True,
            dtype=torch.bfloat16,
        ),
        Architecture(
            "sd3", "Stable Diffusion 3 medium",
            {
                "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
                "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
                "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
            },
            {
                "sample_size": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
                "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32,
                "pos_embed_max_size": 16,
            },
            # 77 tokens of the two CLIP encoders, 256 of T5.
            (16, 128, 128), (16, 16, 16), Schedule.flow(shift=3.0), "flow", TextTransformer, tokens=(333, 7),
            guided=True, dtype=torch.bfloat16,
        ),
        Architecture(
            "flux", "FLUX.1-dev",
            {
                "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
                "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
                "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
            },
            {
                "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
                "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
            },
            # The shift of its 4,096 tokens, exp(1.15).
            (16, 128, 128), (16, 16, 16), Schedule.flow(shift=math.exp(1.15)), "flow", PackedTransformer,
            tokens=(512, 7), dtype=torch.bfloat16,
        ),
    )
}  # fmt: skip
