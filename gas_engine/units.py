"""Bytes in words: ``8GiB`` and back."""

from __future__ import annotations

import re

_UNITS = {
    "b": 1,
    **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)},
    **{f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)},
}


def parse_bytes(text: str) -> int:
    """``"8GiB"``, ``"500 MB"`` -> bytes. Raises ValueError for anything without a unit, such as a ratio."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = match and _UNITS.get(match[2].lower())
    if match is None or not unit or float(match[1]) == 0:
        raise ValueError(f"bytes are a number with its unit, such as 8GiB, got {text!r}")
    return int(float(match[1]) * unit)


def show_bytes(size: float) -> str:
    """In MiB or GiB."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if size >= u), (2**10, "KiB"))
    return f"{size / unit:.{2 if name == 'GiB' else 1}f} {name}"
