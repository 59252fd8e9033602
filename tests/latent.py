"""Small checkpoints of latent diffusion under the original names, with weights made from the names."""

from __future__ import annotations

import copy
import functools
import json
import sys
import zlib
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
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


class ModelCheckpoint:
    """Lightning keeps what its callbacks hold under their classes, which nobody has who only reads the file."""

    __module__ = "pytorch_lightning.callbacks.model_checkpoint"


def save_checkpoint(file: Path, weights: dict[str, Tensor], zipped: bool = True) -> None:
    """A file as Lightning writes it, with PyTorch's format of today or the older one."""
    packages = ModelCheckpoint.__module__.split(".")
    names = [".".join(packages[: n + 1]) for n in range(len(packages))]
    sys.modules |= {name: ModuleType(name) for name in names}
    sys.modules[names[-1]].ModelCheckpoint = ModelCheckpoint
    content = {
        "epoch": 12,
        "global_step": 345,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": OrderedDict(weights),
    }
    content |= {"callbacks": {ModelCheckpoint: {"monitor": "val/loss"}}, "optimizer_states": [], "lr_schedulers": []}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for name in names:
        del sys.modules[name]


def save(directory: Path, kind: str, dtype: torch.dtype = torch.float64, zipped: bool = True, **changes: Any) -> Path:
    """A directory with model.ckpt and config.yaml, with ``changes`` of its model's settings."""
    weights = {k: v.to(dtype) if v.dtype == torch.float64 else v for k, v in state_dict(kind).items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_checkpoint(directory / "model.ckpt", weights, zipped)
    document = settings(kind)
    document["model"]["params"] |= changes
    (directory / "config.yaml").write_text(yaml.safe_dump(document))
    return directory
