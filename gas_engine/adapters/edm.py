"""EDM networks (arXiv 2206.00364): published pickles, and safetensors files that carry their constructor arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._safe_pickle import Record, attributes_of, bounded, mapping_of, read_pickle, said, state_dict_of
from ..denoiser import EDMDenoiser
from ..networks import EDMNetwork, build_edm
from .described import is_safetensors, read_described, write_described

FORMAT = "gas_engine.edm/1"

# Published constructor arguments by position; those that the object also has as attributes go without saying.
_COMMON = ("img_resolution", "img_channels", "label_dim", "use_fp16")
_ARGUMENTS = {
    "EDMPrecond": (*_COMMON, "sigma_min", "sigma_max", "sigma_data", "model_type"),
    "VPPrecond": (*_COMMON, "beta_d", "beta_min", "M", "epsilon_t", "model_type"),
    "VEPrecond": (*_COMMON, "sigma_min", "sigma_max", "model_type"),
}
_UNETS = ("SongUNet", "DhariwalUNet")


class EDMDescription(NamedTuple):
    """What `build_edm` takes: constructor arguments, tensors by name, and the name of the preconditioning."""

    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]
    precond: str


def load_edm(path: Path | str, name: str | None = None, t_eps: float | None = None) -> EDMDenoiser:
    """An EDM network from a published pickle or from what ``save_edm`` wrote; nothing in the file is executed.

    DDPM++, NCSN++ and ADM with EDM, VP or VE preconditioning, conditional or not; the source code inside a pickle is
    not looked at, our own network is built. ``t_eps`` (default: the file's, else 1e-3) ends the schedule.
    Memory: the network, and once more its weights while it is filled.
    Raises ValueError if the file is missing, truncated or not such a network, naming the file.

        denoiser = load_edm("edm-cifar10-32x32-uncond-vp.pkl")
    """
    facts: Mapping[str, str] = {}
    if is_safetensors(path):
        facts, tensors = read_described(path, FORMAT, "an EDM network")
    try:
        if facts:
            description = EDMDescription(json.loads(facts["kwargs"]), tensors, facts["precond"])
        else:
            description = described_edm(read_pickle(path))
        return EDMDenoiser(network_of(description), t_eps or float(facts.get("t_eps", 1e-3)), name or str(path))
    except ValueError as error:
        said = str(error)
        raise ValueError(said if str(path) in said else f"cannot use the network of {path}: {said:.500}") from None
    except Exception as error:  # arguments of the wrong types fail in any way
        raise ValueError(f"{path} does not describe its network completely ({error!r:.200})") from None


def at_resolution(denoiser: EDMDenoiser, resolution: int | None) -> EDMDenoiser:
    """The same denoiser for pictures of another size, which its name then says: these U-Nets are convolutional.

    Raises ValueError unless ``resolution`` pixels can be halved as often as the network does, with two left.
    """
    channels, *own = denoiser.shape or ()
    if resolution is None or own == [resolution, resolution]:
        return denoiser
    levels = {name.split("_")[0] for name in denoiser.network.model.enc}  # type: ignore[union-attr]
    step = 2 ** (len(levels) - 1)
    if resolution < 2 * step or resolution % step:
        raise ValueError(f"a resolution of {resolution} was given; {denoiser.name} takes multiples of {step} above it")
    denoiser.shape = (channels, resolution, resolution)
    denoiser.name = f"{denoiser.name} at {resolution} px"
    return denoiser


def save_edm(network: EDMNetwork, kwargs: dict, path: Path, precond: str = "EDMPrecond", **facts: object) -> None:
    """Write a network with its constructor arguments, and any further facts, as one safetensors file, atomically."""
    write_described(path, network.state_dict(), FORMAT, precond=precond, kwargs=json.dumps(kwargs), **facts)


def network_of(description: EDMDescription) -> EDMNetwork:
    """The network, frozen; its arguments are checked against the weights before memory is taken."""
    _check_counts(description)
    return build_edm(*description)


def described_edm(content: Any) -> EDMDescription:
    """Find the network in what a pickle holds: under ``ema``, or the content itself; a recorded object of a published
    class, or a dict of ``cls``, ``kwargs`` and ``state_dict``.

    Raises ValueError, with what was found, for anything else.
    """
    table = mapping_of(content)
    if table is not None and "ema" in table:
        content = table["ema"]
    elif isinstance(content, dict) and "net" in content:
        raise ValueError("it is a training state; give the network-snapshot beside it, which holds the average 'ema'")
    if isinstance(content, dict):
        return _plain(content)
    if not isinstance(content, Record):
        raise ValueError(f"it holds no network under 'ema', but {said(content)}")
    precond = _class_of(content)
    if precond not in _ARGUMENTS:
        raise ValueError(f"it is a {said(precond)[1:-1]}; known networks: {', '.join(_ARGUMENTS)}")
    return EDMDescription(_arguments(content, precond), _weights(content), precond)


def _plain(table: Mapping[Any, Any]) -> EDMDescription:
    found = [
        next((table[key] for key in keys if key in table), None)
        for keys in (
            ("kwargs", "init_kwargs", "_init_kwargs"),
            ("state_dict", "state", "tensors"),
            ("cls", "precond", "class_name"),
        )
    ]
    kwargs, tensors, precond = mapping_of(found[0]), mapping_of(found[1]), found[2] or "EDMPrecond"
    if kwargs is None or tensors is None or not isinstance(precond, str):
        keys = ", ".join(said(key) for key in list(table)[:8])
        raise ValueError(f"it holds no network under 'ema': it has the keys {keys or 'of nothing'}")
    return EDMDescription(
        {str(key): _plain_value(v) for key, v in kwargs.items()}, _tensors_in(tensors), precond.split(".")[-1]
    )


def _weights(record: Record) -> dict[str, Tensor]:
    """Of a module, or of an object that keeps its ``state_dict``."""
    attributes = attributes_of(record)
    table = mapping_of(attributes.get("state_dict"))
    return state_dict_of(record) if "_modules" in attributes or table is None else _tensors_in(table)


def _tensors_in(table: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors = {str(k): torch.as_tensor(v) for k, v in table.items() if isinstance(v, (Tensor, np.ndarray))}
    bounded(tensors.values())
    return tensors


def _class_of(record: Record) -> str:
    """The name of a recorded class, also of a "persistent" one, which is pickled as a call that brings its source."""
    meta = mapping_of(record.args[0]) if record.args else None
    name = meta.get("class_name") if meta is not None and "class_name" in meta else record.name
    return str(name).split(".")[-1] if isinstance(name, str) else ""


def _arguments(record: Record, precond: str) -> dict[str, Any]:
    attributes = attributes_of(record)
    kwargs = _initial(attributes, _ARGUMENTS[precond])
    inner = (mapping_of(attributes.get("_modules")) or {}).get("model")
    if isinstance(inner, Record) and _class_of(inner) in _UNETS:
        own = _initial(attributes_of(inner), ("img_resolution", "in_channels", "out_channels", "label_dim"))
        kwargs.setdefault("model_type", _class_of(inner))
        if "in_channels" in own:
            kwargs.setdefault("img_channels", own["in_channels"])
        kwargs = {key: v for key, v in own.items() if key not in ("in_channels", "out_channels")} | kwargs
    for name in _ARGUMENTS[precond]:
        if name in attributes and name not in kwargs:
            kwargs[name] = _plain_value(attributes[name])
    return {key: value for key, value in kwargs.items() if key != "use_fp16"}


def _initial(attributes: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments that an object was made with, as a persistent class keeps them."""
    args, kwargs = attributes.get("_init_args") or (), mapping_of(attributes.get("_init_kwargs") or {}) or {}
    if not isinstance(args, (tuple, list)) or len(args) > len(names):
        raise ValueError("its constructor arguments are not those of the published class")
    return {str(key): _plain_value(value) for key, value in (*zip(names, args, strict=False), *kwargs.items())}


def _plain_value(value: Any) -> Any:
    """Numbers of NumPy or in tensors as Python's, tuples as lists: what JSON says."""
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, Tensor)) and math.prod(value.shape) <= 1000):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain_value(part) if isinstance(part, (np.generic, Tensor)) else part for part in value]
    return value


def _check_counts(description: EDMDescription) -> None:
    """A network of arguments that no file has weights for would take forever to build, even without memory."""
    kwargs, most = description.kwargs, len(description.tensors)
    for name in ("num_blocks", "channel_mult", "attn_resolutions", "resample_filter"):
        value = kwargs.get(name, 0)
        count = len(value) if isinstance(value, (list, tuple, str)) else value
        if not isinstance(count, int) or not 0 <= count <= max(most, 16):
            raise ValueError(f"its {name} is {count}, and it holds {most} tensors")
    if any(isinstance(value, int) and abs(value) > 2**20 for value in kwargs.values()):
        raise ValueError("its constructor arguments are larger than those of any network")
