"""EDM networks from safetensors files that carry their constructor arguments."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..denoiser import EDMDenoiser
from ..files import atomic, tensors_sha256
from ..networks import EDMNetwork, build_edm

FORMAT = "gas_engine.edm/1"


def load_edm(path: Path, name: str | None = None) -> EDMDenoiser:
    """Read a network written by ``save_edm``; nothing in the file is executed.

    Raises ValueError if the file is missing, truncated or not such a network, naming the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read the model {path}: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not an EDM network of this package (format {metadata.get('format')!r})")
    if metadata.get("checksum") not in (None, tensors_sha256(tensors)):
        raise ValueError(f"{path} is corrupted: its weights do not match their checksum")
    try:
        network = build_edm(json.loads(metadata["kwargs"]), tensors, metadata["precond"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not describe its network completely ({error!r})") from None
    return EDMDenoiser(network, t_eps=float(metadata.get("t_eps", 1e-3)), name=name or str(path))


def save_edm(network: EDMNetwork, kwargs: dict, path: Path, precond: str = "EDMPrecond", **facts: object) -> None:
    """Write a network with its constructor arguments, and any further facts, as one safetensors file, atomically."""
    metadata = {"format": FORMAT, "precond": precond, "kwargs": json.dumps(kwargs)}
    metadata["checksum"] = tensors_sha256(network.state_dict())
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    with atomic(path) as temporary:
        save_file(network.state_dict(), temporary, metadata)
