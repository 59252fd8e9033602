"""Small checkpoints of latent diffusion under the original names, with weights made from the names."""

from __future__ import annotations

import copy
import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("cin256", "cin256_heads", "lsun_beds256")
UNET, FIRST = "model/params/unet_config/params", "model/params/first_stage_config/params"


@functools.cache
def _settings(kind: str) -> dict[str, Any]:
    document = yaml.safe_load((GOLDEN / f"ldm_{kind.removesuffix('_heads')}.yaml").read_text())
    model = document["model"]["params"]
    unet, first = model["unet_config"]["params"], model["first_stage_config"]["params"]
    model["image_size"] = unet["image_size"] = 8
    unet |= {"model_channels": 32, "channel_mult": [1, 2, 2], "attention_resolutions": [4, 2], "num_res_blocks": 1}
    first |= {"n_embed": 32, "ddconfig": first["ddconfig"] | {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}}
    if kind.startswith("cin256"):
        unet["context_dim"] = 16
        model["cond_stage_config"]["params"] |= {"n_classes": 11, "embed_dim": 16}
    if "num_head_channels" in unet or kind.endswith("_heads"):
        unet.pop("num_heads", None)
        unet["num_head_channels"] = 16
    return document


def settings(kind: str) -> dict[str, Any]:
    """The published YAML of a kind, for a network of the same structure that runs in milliseconds."""
    return copy.deepcopy(_settings(kind))


def changed(path: str, value: Any, kind: str = "cin256") -> dict[str, Any]:
    document = settings(kind)
    *sections, last = path.split("/")
    inner = document
    for section in sections:
        inner = inner[section]
    inner[last] = value
    return document


def weight(name: str, shape: list[int]) -> Tensor:
    """The same numbers, in float64, wherever and whenever they are made."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        return torch.from_numpy(drawn / np.sqrt(np.prod(shape[1:])))
    return torch.from_numpy(0.1 * drawn + name.endswith("weight"))


def golden(kind: str) -> dict[str, Tensor]:
    """Inputs and outputs of the original code."""
    with np.load(GOLDEN / "ldm_f64.npz") as data:
        return {key.partition("/")[2]: torch.from_numpy(data[key]) for key in data.files if key.startswith(f"{kind}/")}


@functools.cache
def state_dict(kind: str) -> dict[str, Tensor]:
    """What the original code would have saved, in float64; its schedule in float32."""
    with np.load(GOLDEN / "ldm_f64.npz") as data:
        shapes = json.loads(bytes(data[f"{kind}.shapes"]))
        schedule = {name: torch.from_numpy(data[name]).float() for name in ("betas", "alphas_cumprod")}
    return schedule | {name: weight(name, shape) for name, shape in shapes.items()}


def save(directory: Path, kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Path:
    """A directory with model.ckpt, as Lightning writes it, and config.yaml."""
    weights = {k: v.to(dtype) if v.dtype == torch.float64 else v for k, v in state_dict(kind).items()}
    content = {"epoch": 12, "global_step": 345, "pytorch-lightning_version": "1.4.2", "state_dict": weights}
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(content | {"callbacks": {}, "optimizer_states": [], "lr_schedulers": []}, directory / "model.ckpt")
    document = settings(kind)
    document["model"]["params"] |= changes
    (directory / "config.yaml").write_text(yaml.safe_dump(document))
    return directory
