"""What the YAML of a latent diffusion model says, as constructor arguments of diffusers' modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures.wrappers import ClassUNet, DiffusersFunction, UNet, diffusers_class
from ..schedule import Schedule

MODEL = "ldm.models.diffusion.ddpm.LatentDiffusion"
NETWORK = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
AUTOENCODER = "ldm.models.autoencoder.VQModelInterface"
EMBEDDER = "ldm.modules.encoders.modules.ClassEmbedder"
IMAGENET = 1000  # ClassEmbedder's own number of rows, none of which is a null class

PREDICTIONS = {"eps": "noise", "x0": "data", "v": "velocity"}
# Settings of the U-Net that we have no equivalent of, with the one value that is understood.
PLAIN: dict[str, Any] = {
    "conv_resample": True, "dims": 2, "num_classes": None, "num_heads_upsample": -1, "use_scale_shift_norm": False,
    "resblock_updown": False, "use_new_attention_order": False, "n_embed": None, "disable_self_attentions": None,
    "num_attention_blocks": None, "disable_middle_self_attn": False, "use_linear_in_transformer": False,
}  # fmt: skip
READ = {
    "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions",
    "num_heads", "num_head_channels", "use_spatial_transformer", "transformer_depth", "context_dim",
}  # fmt: skip
IDLE = {"image_size", "dropout", "use_checkpoint", "use_fp16", "legacy"}  # no part in what a call gives


@dataclass(frozen=True)
class LatentDiffusion:
    """A model without its weights.

    ``unet``, ``first_stage``: arguments of diffusers' classes. ``rows`` of the class embedding, None if unconditional;
    ``betas`` [N] in float64; ``shape`` [C, h, w] of a state; ``scale_factor`` None if the checkpoint says it.
    """

    unet: dict[str, Any]
    first_stage: dict[str, Any]
    betas: Tensor
    schedule: Schedule
    prediction: str
    shape: tuple[int, int, int]
    rows: int | None
    scale_factor: float | None
    use_ema: bool

    @property
    def classes(self) -> int | None:
        return self.rows if self.null is None else self.null

    @property
    def null(self) -> int | None:
        """The index of the class of guidance: the last row, unless there are as many as ImageNet has classes."""
        return None if self.rows in (None, IMAGENET) else self.rows - 1  # type: ignore[operator]

    def function(self) -> DiffusersFunction:
        """The network, with random weights on the default device."""
        if self.rows is None:
            return UNet(self.unet, self.schedule)
        return ClassUNet(self.unet, self.schedule, rows=self.rows)

    def autoencoder(self, scale_factor: float) -> Any:
        """The first stage without its encoder, with random weights on the default device."""
        model: Any = diffusers_class("VQModel")(**self.first_stage, scaling_factor=scale_factor)
        model.encoder = model.quant_conv = None
        return model


def read_config(path: Path) -> LatentDiffusion:
    """Read a YAML. Raises ValueError, with the file and the setting, for what is no such model or is not understood."""
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{path} needs PyYAML, which is not installed: `pip install pyyaml`") from None
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    try:
        return _model(_settings(document, "model", MODEL))
    except KeyError as error:
        raise ValueError(f"{path} lacks the setting {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _model(settings: Mapping[str, Any]) -> LatentDiffusion:
    for name, known in (("beta_schedule", "linear"), ("given_betas", None)):
        if settings.get(name, known) != known:
            raise ValueError(f"{name} is {settings[name]!r:.40}; understood is {known}")
    ends = [_number(settings, name, default) for name, default in (("linear_start", 1e-4), ("linear_end", 2e-2))]
    if not 0 < ends[0] < ends[1] < 1:
        raise ValueError(f"linear_start and linear_end must rise between 0 and 1, got {ends[0]} and {ends[1]}")
    prediction = settings.get("parameterization", "eps")
    if prediction not in list(PREDICTIONS):
        raise ValueError(f"parameterization is {prediction!r:.40}; understood are {', '.join(PREDICTIONS)}")
    rows, width = _classes(settings)
    unet = _unet(_settings(settings, "unet_config", NETWORK), width)
    channels = _count(settings, "channels", 256)
    if not unet["in_channels"] == unet["out_channels"] == channels:
        raise ValueError(
            f"the network must take and give the {channels} channels of the latents, but takes {unet['in_channels']} "
            f"and gives {unet['out_channels']}"
        )
    steps = _count(settings, "timesteps", 10**5, 1000)
    betas = torch.linspace(ends[0] ** 0.5, ends[1] ** 0.5, steps, dtype=torch.float64) ** 2
    size = unet["sample_size"] = _count(settings, "image_size", 4096)
    return LatentDiffusion(
        unet,
        _first_stage(_settings(settings, "first_stage_config", AUTOENCODER)),
        betas,
        Schedule.vp_discrete(torch.cumprod(1 - betas, 0)),
        PREDICTIONS[prediction],
        (channels, size, size),
        rows,
        None if settings.get("scale_by_std") else _number(settings, "scale_factor", 1.0),
        bool(settings.get("use_ema", True)),
    )


def _classes(settings: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Rows and width of the class embedding."""
    if settings["cond_stage_config"] == "__is_unconditional__":
        return None, None
    if settings.get("conditioning_key") != "crossattn":
        raise ValueError(f"conditioning_key is {settings.get('conditioning_key')!r:.40}; understood is crossattn")
    embedder = _settings(settings, "cond_stage_config", EMBEDDER)
    return _count(embedder, "n_classes", 10**6, IMAGENET), _count(embedder, "embed_dim", 65536)


def _unet(settings: Mapping[str, Any], width: int | None) -> dict[str, Any]:
    for name, value in settings.items():
        if name not in PLAIN and name not in READ and name not in IDLE:
            raise ValueError(f"the network has a setting {name!r:.40}, which is not understood")
        if name in PLAIN and value != PLAIN[name]:
            raise ValueError(f"the network has {name}: {value!r:.40}; understood is {PLAIN[name]}")
    if bool(settings.get("use_spatial_transformer")) != (width is not None) or settings.get("context_dim") != width:
        raise ValueError(
            f"the network's context_dim {settings.get('context_dim')!r:.40} (use_spatial_transformer: "
            f"{settings.get('use_spatial_transformer', False)!r:.40}) does not fit classes of width {width}"
        )
    channels = [_count(settings, "model_channels", 8192) * m for m in _counts(settings, "channel_mult")]
    attends = [2**level in _counts(settings, "attention_resolutions") for level in range(len(channels))]
    kind = "Attn" if width is None else "CrossAttn"
    levels = [f"{kind if attend else ''}{{}}Block2D" for attend in attends]
    arguments: dict[str, Any] = {
        "in_channels": _count(settings, "in_channels", 256),
        "out_channels": _count(settings, "out_channels", 256),
        "block_out_channels": channels,
        "layers_per_block": _count(settings, "num_res_blocks", 16),
        "down_block_types": [level.format("Down") for level in levels],
        "up_block_types": [level.format("Up") for level in reversed(levels)],
    }
    heads, head_width = settings.get("num_heads", -1), settings.get("num_head_channels", -1)
    if head_width != -1:
        head_width = _count(settings, "num_head_channels", 65536)
        for count in channels:
            if count % head_width:
                raise ValueError(f"heads {head_width} wide do not divide a level of {count} channels")
    else:
        heads = _count(settings, "num_heads", 65536)
    if width is None:
        if head_width == -1 and heads != 1:
            raise ValueError(f"the unconditional network has num_heads: {heads}; understood are 1 or num_head_channels")
        return arguments | {"attention_head_dim": None if head_width == -1 else head_width}
    # What diffusers calls attention_head_dim is the number of heads here.
    number = heads if head_width == -1 else [count // head_width for count in channels]
    depth = _count(settings, "transformer_depth", 16, 1)
    return arguments | {
        "attention_head_dim": number, "cross_attention_dim": width, "transformer_layers_per_block": depth,
    }  # fmt: skip


def _first_stage(settings: Mapping[str, Any]) -> dict[str, Any]:
    inner = settings["ddconfig"]
    if not isinstance(inner, Mapping):
        raise ValueError(f"ddconfig is {inner!r:.40}")
    if inner.get("attn_resolutions") or inner.get("double_z"):
        raise ValueError("first stages with attn_resolutions or double_z are not understood, but those like VQ-f4")
    multiples = _counts(inner, "ch_mult")
    return {
        "in_channels": _count(inner, "in_channels", 256),
        "out_channels": _count(inner, "out_ch", 256),
        "block_out_channels": [_count(inner, "ch", 8192) * m for m in multiples],
        "down_block_types": ["DownEncoderBlock2D"] * len(multiples),
        "up_block_types": ["UpDecoderBlock2D"] * len(multiples),
        "layers_per_block": _count(inner, "num_res_blocks", 16),
        "latent_channels": _count(inner, "z_channels", 256),
        "sample_size": _count(inner, "resolution", 65536),
        "num_vq_embeddings": _count(settings, "n_embed", 2**24),
        "vq_embed_dim": _count(settings, "embed_dim", 256),
    }


def _settings(section: Any, name: str, known: str) -> Mapping[str, Any]:
    """The parameters of a section of a known class; forks may keep it in a package of their own."""
    inner = section.get(name) if isinstance(section, Mapping) else None
    target = inner.get("target") if isinstance(inner, Mapping) else inner
    if not isinstance(inner, Mapping) or not f".{target}".endswith(f".{known}"):
        hint = "; for Stable Diffusion give a diffusers directory" if "CLIP" in str(target) else ""
        raise ValueError(f"{name} is {target!r:.120}, which is not understood; {known} is{hint}")
    if not isinstance(inner.get("params"), Mapping):
        raise ValueError(f"{name} has no params")
    return inner["params"]


def _number(settings: Mapping[str, Any], name: str, default: float) -> float:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be a positive number, got {value!r:.40}")
    return float(value)


def _count(settings: Mapping[str, Any], name: str, most: int, default: int | None = None) -> int:
    value = settings[name] if default is None else settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r:.40}")
    return value


def _counts(settings: Mapping[str, Any], name: str) -> list[int]:
    values = settings[name]
    if not isinstance(values, list) or not 1 <= len(values) <= 8:
        raise ValueError(f"{name} must be a list of 1 to 8 numbers, got {values!r:.40}")
    return [_count({name: value}, name, 128) for value in values]
