"""Teacher sets as they are published (``dataset.pkl``), with the noise that they were drawn from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._safe_pickle import bounded, mapping_of, read_pickle, said
from .described import is_safetensors, read_described, write_described

FORMAT = "gas_engine.published_set/1"


@dataclass(frozen=True)
class PublishedSet:
    """Rows of a published teacher set: ``noise`` and ``samples`` [N, C, H, W] float32 (latents where the model has
    them, else images), ``cond`` None, classes int64 [N], or N prompts."""

    noise: Tensor
    samples: Tensor
    cond: Tensor | list[str] | None = None

    def __len__(self) -> int:
        return len(self.noise)


def read_published_teacher_set(path: Path | str) -> PublishedSet:
    """A published ``dataset.pkl``, or what ``write_published_teacher_set`` made of it; nothing in it is executed.

    Their noise came from the generator of a GPU, so it is stored, not drawn from seeds. Training takes the first rows,
    validation the last ones. Memory: the set twice while it is read.
    Raises ValueError, naming the file, for a file that is missing, damaged or no such set.

        rows = read_published_teacher_set("dataset.pkl")
        x, wanted = rows.noise[:24], rows.samples[:24]
    """
    if is_safetensors(path):
        facts, tensors = read_described(path, FORMAT, "a published teacher set")
        prompts = json.loads(facts["prompts"]) if "prompts" in facts else None
        return PublishedSet(tensors["noise"], tensors["samples"], tensors.get("cond", prompts))
    content = read_pickle(path)
    try:
        return teacher_rows(content)
    except Exception as error:  # rows of the wrong types fail in any way
        reason = str(error) if type(error) is ValueError else f"its rows are damaged ({type(error).__name__})"
        raise ValueError(f"{path} is no published teacher set: {reason}") from None


def write_published_teacher_set(rows: PublishedSet, path: Path, **facts: Any) -> None:
    """Write the rows as one safetensors file, atomically."""
    tensors = {"noise": rows.noise, "samples": rows.samples}
    if isinstance(rows.cond, Tensor):
        tensors["cond"] = rows.cond
    elif rows.cond is not None:
        facts["prompts"] = json.dumps(rows.cond)
    write_described(path, tensors, FORMAT, **facts)


def teacher_rows(content: Any) -> PublishedSet:
    """The rows of a table of lists ``noise``, ``images``, ``latents``, ``condition``. Raises ValueError otherwise."""
    table = mapping_of(content)
    if table is None or "noise" not in table:
        keys = ", ".join(said(key) for key in list(table or ())[:8])
        raise ValueError(f"it has no 'noise', but {keys or said(content)}")
    noise = _stacked("noise", table["noise"])
    latents, images = table.get("latents"), table.get("images")
    samples = _stacked("latents", latents) if _given(latents) else _stacked("images", images)
    if len(noise) != len(samples):
        raise ValueError(f"it has {len(noise)} rows of noise and {len(samples)} of samples")
    return PublishedSet(noise, samples, _conditions(table.get("condition"), len(noise)))


def _given(column: Any) -> bool:
    return column is not None and len(column) > 0 and any(row is not None for row in column)


def _stacked(name: str, column: Any) -> Tensor:
    if isinstance(column, (Tensor, np.ndarray)):
        column = list(column)
    if not isinstance(column, (list, tuple)) or not column:
        raise ValueError(f"its {name} is {said(column)}, not a list of arrays [C, H, W]")
    rows = []
    for row in column:
        if not isinstance(row, (Tensor, np.ndarray)):
            raise ValueError(f"a row of its {name} is {said(row)}, not an array [C, H, W]")
        rows.append(torch.as_tensor(row))
        if rows[-1].ndim != 3 or rows[-1].shape != rows[0].shape or not rows[-1].is_floating_point():
            raise ValueError(f"a row of its {name} is {rows[-1].dtype} {list(rows[-1].shape)}, not float [C, H, W]")
    bounded(rows)
    return torch.stack(rows).float()


def _conditions(column: Any, count: int) -> Tensor | list[str] | None:
    if isinstance(column, (Tensor, np.ndarray)):
        column = column.tolist()
    if not _given(column):
        return None
    if not isinstance(column, (list, tuple)) or len(column) != count:
        raise ValueError(f"its conditions are {said(column)}, not one for each of {count} rows")
    values = [row.item() if isinstance(row, (Tensor, np.ndarray, np.generic)) else row for row in column]
    if all(isinstance(value, str) for value in values):
        return [str(value) for value in values]
    if all(type(value) is int and 0 <= value < 2**31 for value in values):
        return torch.tensor(values)
    raise ValueError("its conditions are neither all classes nor all prompts")
