"""Latent diffusion (arXiv 2112.10752) from the original Lightning checkpoint and its YAML, onto diffusers' modules.

Neither file is executed: the classes that the YAML names are compared with known ones and never imported.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .._safe_pickle import mapping_of, read_pickle, said
from ..conditioning import Classes
from ..denoiser import Denoiser
from ..losses.decoders import VAE
from ._ldm_config import LatentDiffusion, read_config

UNET, FIRST_STAGE, CLASSES = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.embedding.weight"
ATTENTION = re.compile(r"(.*\.attentions\.\d+\.)(norm|qkv|proj_out)\.(weight|bias)")


def load_ldm(path: Path | str, config: Path | str | None = None) -> Denoiser:
    """A class-conditional or unconditional model of latent diffusion with its VQ decoder, frozen, predicting noise.

    ``path``: the ``.ckpt``, with its YAML beside it (of the same stem, ``config.yaml``, or the only one), or the
    directory of both; ``config`` is a YAML elsewhere. States [B, C, h, w] as the YAML says, such as 3 x 64 x 64;
    conditions are class indices int64 [B] (the last row of the embedding is the null class of guidance) or None. The
    network is told ``N t - 1``, with its fraction; the YAML's schedule has ``sqrt(beta)`` linear in n, n = 1..N.
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
    with _found(f"{checkpoint} and {document} do not belong together"):
        _same_schedule(model, weights)
        scale = _scale(model, weights)
    with _found(f"cannot build the networks of {document}"), torch.device("meta"):
        function, autoencoder = model.function(), model.autoencoder(scale)
    with _found(f"{checkpoint} does not hold the network of {document}"):
        _fill(function, _network(model, weights))
    with _found(f"{checkpoint} does not hold the first stage of {document}"):
        _fill(autoencoder, _decoder(model, weights))
    conditioning = None if model.classes is None else Classes(model.classes, model.null)
    return Denoiser(
        function, model.schedule, model.prediction, model.shape, conditioning=conditioning, decoder=VAE(autoencoder),
        name=str(path),
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
    found = sorted(file for file in directory.glob(f"*.{suffix}") if file.is_file())
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4]) or "none"
        raise ValueError(
            f"a latent diffusion model is a .ckpt and its YAML side by side; {directory} should hold "
            f"{' or '.join(preferred)} or one .{suffix} alone, and holds {names}"
        )
    return found[0]


def _state_dict(path: Path) -> dict[str, Tensor]:
    content = read_pickle(path)
    found = mapping_of(content)
    weights = None if found is None else mapping_of(found.get("state_dict", found))
    if weights is None:
        raise ValueError(f"{path} holds no state_dict: it is {said(content)}")
    return {key: value for key, value in weights.items() if isinstance(key, str) and isinstance(value, Tensor)}


@contextlib.contextmanager
def _found(problem: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{problem}: there is no {error.args[0]}") from None
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"{problem}: {str(error).splitlines()[0]}") from None


def _same_schedule(model: LatentDiffusion, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the checkpoint's own, in single precision or half, is the YAML's."""
    for name, ours in (("betas", model.betas), ("alphas_cumprod", (1 - model.betas).cumprod(0))):
        theirs = weights.get(name, ours).double()
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=2e-3, atol=1e-6):
            ends = [f"{float(row[0]):.6g}..{float(row[-1]):.6g}" for row in (theirs.flatten(), ours)]
            raise ValueError(f"their {name} are {ends[0]} and {ends[1]}")


def _scale(model: LatentDiffusion, weights: Mapping[str, Tensor]) -> float:
    """The factor that latents are multiplied by; training may have measured it (``scale_by_std``)."""
    scale = float(weights["scale_factor"] if model.scale_factor is None else model.scale_factor)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale_factor is {scale}")
    return scale


def _fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module on the meta device its weights, as they are, frozen."""
    needed = module.state_dict()
    for verb, names in (("lacks", needed.keys() - weights.keys()), ("also has", weights.keys() - needed.keys())):
        if names:
            raise ValueError(f"it {verb} {min(names)}, one of {len(names)}")
    for name, tensor in needed.items():
        given = weights[name]
        if given.shape != tensor.shape or not given.is_floating_point():
            raise ValueError(f"{name} is {given.dtype} {list(given.shape)} instead of float {list(tensor.shape)}")
    module.load_state_dict(weights, assign=True)
    module.eval().requires_grad_(False)


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
        match = ATTENTION.fullmatch(name)
        if match is None:
            found[name] = value
            continue
        block, layer, kind = match.groups()
        value = value.flatten(1) if value.ndim > 1 else value
        if layer == "qkv":
            heads = value.unflatten(0, (-1, 3, width or len(value) // 3))
            found |= {f"{block}to_{key}.{kind}": heads[:, i].flatten(0, 1) for i, key in enumerate("qkv")}
        else:
            found[f"{block}{'group_norm' if layer == 'norm' else 'to_out.0'}.{kind}"] = value
    return found


def _decoder(model: LatentDiffusion, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    parts = tuple(FIRST_STAGE + part for part in ("decoder.", "post_quant_conv."))
    levels = {f"{way}_block_types": model.first_stage[f"{way}_block_types"] for way in ("down", "up")}
    found = convert_ldm_vae_checkpoint({k: v for k, v in weights.items() if k.startswith(parts)}, levels)
    return found | {"quantize.embedding.weight": weights[FIRST_STAGE + "quantize.embedding.weight"]}
