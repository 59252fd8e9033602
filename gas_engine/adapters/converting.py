"""Third-party files -> safetensors and JSON, with the same loaders behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .._safe_pickle import Name, Record, bounded, mapping_of, read_pickle, said
from ..files import sha256, write_json
from ..networks import R3GANDiscriminator
from . import edm, published, r3gan
from .described import is_safetensors, write_described

CHECKPOINT = "gas_engine.checkpoint/1"
_MOST_VALUES = 100_000


def kind_of(path: Path | str) -> str:
    """``"edm"``, ``"r3gan"``, ``"teacher set"``, ``"student"`` or ``"checkpoint"``: what a third-party file holds.

    Raises ValueError, with what was found, for anything else.
    """
    return _kind(path, _content(path))


def to_safetensors(path: Path | str, out: Path | str) -> list[Path]:
    """Convert a file to ``out`` (safetensors) and a JSON file beside it; return both. Nothing in it is executed.

    EDM networks, R3GAN discriminators and teacher sets are read back by ``load_edm``, ``load_r3gan`` and
    ``read_published_teacher_set``; of a checkpoint the tensors keep their names (those of its ``state_dict`` where it
    has one) and the rest becomes JSON. Both files are written atomically.
    Memory: the tensors once; those of a zip file come from the disk as they are written.
    Raises ValueError for a file that is none of these, naming it.

        to_safetensors("edm-cifar10-32x32-uncond-vp.pkl", "edm-cifar10.safetensors")
    """
    path, out = Path(path), Path(out)
    content = _content(path)
    kind = _kind(path, content)
    if kind == "student":
        raise ValueError(
            f"{path} is a published student, which does not say its schedule: load_solver(path, schedule, t_eps)"
        )
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} is no name for a .safetensors file")
    try:
        facts = _WRITERS[kind](content, out)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"cannot convert {path}: {' '.join(str(error).split())[:300]}") from None
    described = out.with_suffix(".json")
    write_json(described, {"kind": kind, "source": path.name, "sha256": sha256(path), **facts})
    return [out, described]


def _content(path: Path | str) -> Any:
    if is_safetensors(path):
        raise ValueError(f"{path} is a safetensors file already")
    return read_pickle(path)


def _kind(path: Path | str, content: Any) -> str:
    for kind, make in (
        ("student", _student), ("teacher set", _rows), ("edm", edm.described_edm),
        ("r3gan", _discriminator), ("checkpoint", _named_tensors),
    ):  # fmt: skip
        try:
            make(content)
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, IndexError):
            continue
        return kind
    found = ", ".join(said(key) for key in list(mapping_of(content) or ())[:8]) or said(content)
    raise ValueError(f"{path} is no EDM network, R3GAN snapshot, teacher set, student or checkpoint: it holds {found}")


def _student(content: Any) -> None:
    average = mapping_of(content["ema"])
    if average is None or "shadow_params" not in average:
        raise ValueError("no published student")


def _rows(content: Any) -> None:
    if not {"noise", "condition"} <= (mapping_of(content) or {}).keys():
        raise ValueError("no published teacher set")


def _discriminator(content: Any) -> dict[str, Tensor]:
    tensors = r3gan.discriminator_weights(content)
    if not any("ExtractionLayer" in name for name in tensors):
        raise ValueError("no R3GAN discriminator")
    return tensors


def _write_edm(content: Any, out: Path) -> dict[str, Any]:
    description = edm.described_edm(content)
    network = edm.network_of(description)
    edm.save_edm(network, description.kwargs, out, description.precond)
    return {"precond": description.precond, "kwargs": _plain(description.kwargs), "parameters": _count(network)}


def _write_r3gan(content: Any, out: Path) -> dict[str, Any]:
    network = R3GANDiscriminator.from_published(None, _discriminator(content))
    write_described(out, network.state_dict(), r3gan.FORMAT)
    return {"shape": [network.channels, network.size, network.size], "parameters": _count(network)}


def _write_set(content: Any, out: Path) -> dict[str, Any]:
    rows = published.teacher_rows(content)
    published.write_published_teacher_set(rows, out)
    cond = {Tensor: "classes", list: "prompts"}.get(type(rows.cond))
    return {
        "rows": len(rows),
        "noise": list(rows.noise.shape[1:]),
        "samples": list(rows.samples.shape[1:]),
        "cond": cond,
    }


def _write_checkpoint(content: Any, out: Path) -> dict[str, Any]:
    tensors = _named_tensors(content)
    write_described(out, tensors, CHECKPOINT)
    table = mapping_of(content) or {}
    rest = {key: value for key, value in table.items() if key != "state_dict" and not isinstance(value, Tensor)}
    return {"tensors": len(tensors), "rest": _plain(rest)}


def _named_tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint's ``state_dict``, or of the checkpoint itself, by name."""
    table = mapping_of(content) or {}
    table = mapping_of(table.get("state_dict")) or table
    tensors = {str(name): value for name, value in table.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("it holds no tensors by name")
    bounded(tensors.values())
    return tensors


def _count(network: Any) -> int:
    return sum(p.numel() for p in network.parameters())


def _plain(value: Any) -> Any:
    """What JSON can say of a value read from a pickle: records by their name and what they hold, tensors by shape."""
    left = _MOST_VALUES

    def plain(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if isinstance(value, str):
            left -= len(value) // 64
            return value if left >= 0 else "..."
        if value is None or type(value) in (bool, int):
            return value
        if isinstance(value, (float, np.floating)):
            return float(value) if math.isfinite(value) else str(value)
        if left < 0 or depth > 50:
            return "..."
        if isinstance(value, dict):
            return {said(k).strip("'")[:200]: plain(v, depth + 1) for k, v in islice(value.items(), left + 1)}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(part, depth + 1) for part in islice(value, left + 1)]
        if isinstance(value, Record):
            held = {"args": value.args, "kwargs": value.kwargs, "state": value.state, "items": value.items}
            named = {"class": f"{value.module}.{value.name}"[:200]}
            said_so = {key: part for key, part in held.items() if not _is_empty(part)}
            return named | {key: plain(part, depth + 1) for key, part in said_so.items()}
        if isinstance(value, Name):
            return f"{value.module}.{value.name}"[:200]
        if isinstance(value, (Tensor, np.ndarray)):
            return {"dtype": str(value.dtype), "shape": list(value.shape)}
        if isinstance(value, np.generic):
            return value.item()
        return f"{type(value).__name__}"

    return plain(value, 0)


def _is_empty(part: Any) -> bool:
    return part is None or (isinstance(part, (tuple, dict, list)) and not part)


_WRITERS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    "edm": _write_edm, "r3gan": _write_r3gan, "teacher set": _write_set, "checkpoint": _write_checkpoint,
}  # fmt: skip
