"""Safetensors files that describe themselves: tensors, a format, facts as JSON, and a checksum of the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic, tensors_sha256


def is_safetensors(path: Path | str) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and a brace."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def write_described(path: Path, tensors: Mapping[str, Tensor], form: str, **facts: Any) -> None:
    """Write tensors with their format and facts, atomically; what shares memory is written apart."""
    dense: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        dense[name] = value.detach().contiguous()
        place = dense[name].untyped_storage().data_ptr()
        if place in seen:
            dense[name] = dense[name].clone()
        seen.add(place)
    metadata = {"format": form, "checksum": tensors_sha256(dense)}
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    with atomic(path) as temporary:
        save_file(dense, temporary, metadata)


def read_described(path: Path | str, form: str, what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Facts, as they were written, and tensors; `what` the file should be, in words.

    Raises ValueError if the file is missing, truncated, corrupted or of another format, naming the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == form:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # a damaged file fails in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"cannot read {what} {path}: {reason}") from None
    if metadata.get("format") != form:
        raise ValueError(f"{path} is not {what} of this package (format {ascii(metadata.get('format'))[:60]})")
    if metadata.get("checksum") not in (None, tensors_sha256(tensors)):
        raise ValueError(f"{path} is corrupted: its weights do not match their checksum")
    return metadata, tensors
