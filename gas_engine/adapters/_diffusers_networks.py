"""What a network of diffusers says of itself: how it is called, the shape of its states, what classes it has."""

from __future__ import annotations

from typing import Any

from ..architectures import wrappers
from ..architectures.wrappers import DiffusersFunction
from ..conditioning import Classes
from ..schedule import Schedule
from ._diffusers_named import NamedFunction

_FUNCTIONS: dict[str, type[DiffusersFunction]] = {
    "UNet2DModel": wrappers.UNet,
    "UNet2DConditionModel": wrappers.TextUNet,
    "DiTTransformer2DModel": wrappers.ClassTransformer,
    "PixArtTransformer2DModel": wrappers.MaskedTextTransformer,
    "SD3Transformer2DModel": wrappers.TextTransformer,
    "FluxTransformer2DModel": wrappers.PackedTransformer,
}
_FLUX_SIZE = 128  # latents a side, 1024 pixels: its configuration has no size
_TOLD_SIGMA = ("AuraFlowTransformer2DModel",)  # not a thousand times that
_REVERSED = ("Lumina2Transformer2DModel", "LuminaNextDiT2DModel", "ZImageTransformer2DModel")


def function_of(network: Any, schedule: Schedule, labels: int) -> DiffusersFunction:
    """The network as a denoiser's function. Raises ValueError for an input that nothing here provides."""
    name, config = type(network).__name__, network.config
    if name in _REVERSED:
        raise ValueError(f"{name} takes a 'timestep' that runs from data to noise, which is not served")
    kind = _FUNCTIONS.get(name, NamedFunction)
    if name == "UNet2DConditionModel":
        added = config.addition_embed_type
        if added not in (None, "text_time"):
            raise ValueError(f"{name} takes 'added_cond_kwargs' of the kind {added!r}, which is not served")
        kind = wrappers.TextSizeUNet if added else kind
        for option, needs in (
            ("num_class_embeds", "class_labels"), ("class_embed_type", "class_labels"),
            ("time_cond_proj_dim", "timestep_cond"), ("encoder_hid_dim_type", "image_embeds"),
        ):  # fmt: skip
            if config.get(option) is not None:
                raise ValueError(f"{name} with {option} = {config[option]!r} takes {needs!r}, which is not served")
    if name == "UNet2DModel" and config.get("class_embed_type") is not None:
        raise ValueError(f"{name} takes 'class_labels' of the kind {config.class_embed_type!r}, which is not served")
    told = 1.0 if name in _TOLD_SIGMA else labels * float(config.get("timestep_scale") or 1.0)
    return kind(network, schedule, told)


def shape_of(network: Any, scale: int, resolution: int | None) -> tuple[int, int, int]:
    """States [C, H, W]; ``scale``: pixels per latent. Raises ValueError for a resolution that does not divide."""
    name, config = type(network).__name__, network.config
    packed = name == "FluxTransformer2DModel"
    channels, returned = config.get("in_channels"), config.get("out_channels") or config.get("in_channels")
    if not isinstance(channels, int) or returned not in (channels, 2 * channels):
        raise ValueError(
            f"{name} takes {channels} channels and returns {returned}: its 'in_channels' hold more than a state, such "
            "as a mask or an image, which is not served"
        )
    channels = channels // 4 if packed else channels
    step = scale * _patch(network)
    if resolution is not None:
        if resolution < 1 or resolution % step:
            raise ValueError(f"the resolution of {name} must be a multiple of {step} pixels, got {resolution}")
        return channels, resolution // scale, resolution // scale
    size = config.get("sample_size") or (_FLUX_SIZE if packed else None)
    if size is None:
        raise ValueError(f"{name} says no 'sample_size'; give a resolution")
    rows, columns = (size, size) if isinstance(size, int) else size
    return channels, int(rows), int(columns)


def tokens_of(network: Any, shape: tuple[int, int, int]) -> int:
    """Of an image, by which a flow's shift may follow the resolution."""
    patch = _patch(network)
    return (shape[1] // patch) * (shape[2] // patch)


def classes_of(network: Any) -> Classes | None:
    """Of a class-conditional network; DiT has one more, which says nothing."""
    if type(network).__name__ == "DiTTransformer2DModel":
        count = network.config.num_embeds_ada_norm
        return Classes(count, null=count)
    count = network.config.get("num_class_embeds")
    return Classes(count) if count else None


def _patch(network: Any) -> int:
    """States' sides are multiples of this."""
    config = network.config
    if type(network).__name__ == "FluxTransformer2DModel":
        return 2
    if type(network).__name__ == "UNet2DModel":  # which has no way to make up for odd sides
        return 2 ** (len(config.block_out_channels) - 1)
    patch = config.get("patch_size") or 1
    if not isinstance(patch, int):
        raise ValueError(f"{type(network).__name__} has 'patch_size' {list(patch)}: its states are no pictures")
    return patch
