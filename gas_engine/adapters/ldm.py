"""Latent diffusion (arXiv 2112.10752) from the original Lightning checkpoint and its YAML, onto diffusers' modules.

Neither file is executed: the classes that the YAML names are compared with known ones and never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..conditioning import Classes
from ..denoiser import Denoiser
from ..losses.decoders import VAE
from ._ldm_config import LatentDiffusion, read_config

UNET, FIRST_STAGE, CLASSES = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.embedding.weight"


def load_ldm(path: Path | str, config: Path | str | None = None) -> Denoiser:
    """A class-conditional or unconditional model of latent diffusion with its VQ decoder, frozen, predicting noise.

    ``path``: the ``.ckpt``, with its YAML beside it (of the same stem, ``config.yaml``, or the only one), or the
    directory of both; ``config`` is a YAML elsewhere. States [B, C, h, w] as the YAML says, such as 3 x 64 x 64;
    conditions are class indices int64 [B] (the last row of the embedding is the null class of guidance) or None. The
    network is told ``1000 t - 1``, with its fraction, on the YAML's schedule ``sqrt(beta)`` linear in n, n = 1..1000.
    Where ``use_ema`` holds, as it does by default, and the file has them, the averaged weights are taken.

    ``decoder``: latents -> images [B, 3, H, W] in [-1, 1]. It divides by the scale factor and rounds to the codebook,
    as the original does; gradients pass the rounding unchanged (straight through, arXiv 1711.00937).

    Weights keep the file's precision and, where it allows that, stay mapped from it until they are used; the encoder
    is not loaded. Raises ValueError, with the file and what was found, for files that are missing, damaged or do not
    belong together, and for models of other kinds.

        denoiser = load_ldm("cin256-v2/model.ckpt")
        denoiser = guided(denoiser, 2.0, denoiser.conditioning.null)
    """
    checkpoint, document = _files(Path(path), None if config is None else Path(config))
    model = read_config(document)
    weights = _state_dict(checkpoint)
    _same_schedule(model, weights, f"{checkpoint} and {document} do not belong together")
    scale = float(weights.get("scale_factor", model.scale_factor))

    def filled(module: nn.Module, tensors: Callable[[], dict[str, Tensor]], what: str) -> nn.Module:
        problem = f"{checkpoint} does not hold the {what} of {document}"
        try:
            found = tensors()
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{problem}: {str(error).splitlines()[0]}") from None
        _compare(found, module.state_dict(), problem)
        module.load_state_dict(found, assign=True)
        return module.eval().requires_grad_(False)

    with torch.device("meta"):
        function, autoencoder = model.function(), model.autoencoder(scale)
    conditioning = None if model.classes is None else Classes(model.classes, model.null)
    return Denoiser(
        filled(function, lambda: _network(model, weights), "network"),  # type: ignore[arg-type]
        model.schedule, model.prediction, model.shape, conditioning=conditioning,
        decoder=VAE(filled(autoencoder, lambda: _decoder(model, weights), "first stage")), name=str(path),
    )  # fmt: skip


def _files(path: Path, config: Path | None) -> tuple[Path, Path]:
    directory = path if path.is_dir() else path.parent
    checkpoint = _only(directory, "ckpt", "model.ckpt") if path.is_dir() else path
    if not checkpoint.is_file():
        raise ValueError(f"there is no checkpoint {checkpoint}")
    return checkpoint, config or _only(directory, "yaml", f"{checkpoint.stem}.yaml", "config.yaml")


def _only(directory: Path, suffix: str, *preferred: str) -> Path:
    for name in preferred:
        if (directory / name).is_file():
            return directory / name
    found = sorted(directory.glob(f"*.{suffix}"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4]) or "none"
        raise ValueError(
            f"a latent diffusion model is a .ckpt and its YAML side by side; {directory} should hold "
            f"{' or '.join(preferred)} or one .{suffix} alone, and holds {names}"
        )
    return found[0]


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(f"cannot read the checkpoint {path}: {str(error).splitlines()[0]}") from None
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path} holds no state_dict: it is {type(content).__name__}")
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}


def _same_schedule(model: LatentDiffusion, weights: Mapping[str, Tensor], problem: str) -> None:
    """Checkpoints keep their schedule in single precision, or half."""
    for name, ours in (("betas", model.betas), ("alphas_cumprod", (1 - model.betas).cumprod(0))):
        theirs = weights.get(name, ours).double()
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=2e-3, atol=1e-6):
            ends = [f"{float(v.flatten()[0]):.6g}..{float(v.flatten()[-1]):.6g}" for v in (theirs, ours) if v.numel()]
            raise ValueError(f"{problem}: their {name} are {' and '.join(ends)}")


def _compare(found: Mapping[str, Tensor], needed: Mapping[str, Tensor], problem: str) -> None:
    missing, unknown = sorted(needed.keys() - found.keys()), sorted(found.keys() - needed.keys())
    for said, names in (("lacks", missing), ("has besides", unknown)):
        if names:
            raise ValueError(f"{problem}: it {said} {len(names)} tensors, {names[0]} among them")
    for name, tensor in needed.items():
        if found[name].shape != tensor.shape:
            raise ValueError(f"{problem}: {name} is {list(found[name].shape)} instead of {list(tensor.shape)}")


def _network(model: LatentDiffusion, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = [key for key in weights if key.startswith(UNET)]
    averages = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in names}
    averaged = model.use_ema and any(key in weights for key in averages.values())
    taken = {key: weights[averages[key] if averaged else key] for key in names}
    found = convert_ldm_unet_checkpoint(taken, {"layers_per_block": model.unet["layers_per_block"]})
    if model.classes is None:
        found = _linear_attention(found, model.unet["attention_head_dim"])
    found = {f"network.{key}": value for key, value in found.items()}
    return found if model.classes is None else found | {"embedding.weight": weights[CLASSES]}


def _linear_attention(weights: Mapping[str, Tensor], width: int | None) -> dict[str, Tensor]:
    """Attention by 1x1 convolutions as linear layers; query, key and value of a head (``width``) follow each other."""
    found = {}
    for name, value in weights.items():
        block, _, rest = name.partition(".attentions.")
        index, _, layer = rest.partition(".")
        layer, _, kind = layer.partition(".")
        place = f"{block}.attentions.{index}"
        if layer == "qkv":
            parts = value.flatten(1) if value.ndim > 1 else value
            for letter, part in zip(
                "qkv", parts.unflatten(0, (-1, 3, width or len(value) // 3)).unbind(1), strict=True
            ):
                found[f"{place}.to_{letter}.{kind}"] = part.flatten(0, 1)
        elif layer == "proj_out":
            found[f"{place}.to_out.0.{kind}"] = value.flatten(1) if value.ndim > 1 else value
        else:
            found[f"{place}.group_norm.{kind}" if layer == "norm" else name] = value
    return found


def _decoder(model: LatentDiffusion, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    parts = tuple(FIRST_STAGE + part for part in ("decoder.", "post_quant_conv."))
    levels = {f"{way}_block_types": model.first_stage[f"{way}_block_types"] for way in ("down", "up")}
    found = convert_ldm_vae_checkpoint({k: v for k, v in weights.items() if k.startswith(parts)}, levels)
    return found | {"quantize.embedding.weight": weights[FIRST_STAGE + "quantize.embedding.weight"]}
