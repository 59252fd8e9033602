"""Held-out samples side by side, as a run keeps them and as the page shows them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic

SAMPLES = "held_out.safetensors"
MOST = 24  # samples
ON_DISK, ON_PAGE = 32 * 2**20, 2 * 2**20  # bytes, with one sample at least
LOSSLESS = 128  # pixels a side; larger pictures go to the page as JPEG


def save_samples(path: Path, names: Sequence[tuple[str, str]], rows: Sequence[Tensor]) -> None:
    """Write rows of pictures [N, C, H, W] in [-1, 1] in 8 bits, and each row's error to the first, the teacher's.

    An error is the mean of |x - teacher| over channels, taken before rounding, as a fraction of ``top``, the 99.5 %
    quantile of all. ``names``: a solver and its setting for each row. Files: at most 24 samples and 32 MiB.
    """
    teacher, *others = (values[:MOST].float() for values in rows)
    teacher, *others = (values[:, :3] if values.shape[1] in (3, 4) else values[:, :1] for values in (teacher, *others))
    height, width = teacher.shape[-2:]
    count = max(1, min(len(teacher), ON_DISK // (len(rows) * 4 * height * width)))
    teacher, *others = (values[:count] for values in (teacher, *others))
    errors = [(values - teacher).abs().mean(1) for values in others]
    some = torch.cat([error.flatten() for error in errors])[:: max(1, len(errors) * teacher.numel() // 2**23)]
    top = max(float(torch.quantile(some.nan_to_num(), 0.995)), 1e-9)
    tensors = {f"{i}": _bytes((values + 1) / 2) for i, values in enumerate((teacher, *others))}
    tensors |= {f"{i}.error": _bytes(error / top) for i, error in enumerate(errors, start=1)}
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"names": json.dumps(names), "top": json.dumps(top)})


def read_samples(path: Path) -> dict[str, Any]:
    """What ``save_samples`` wrote, as images for a page: names, data URIs, and the error that is drawn brightest.

    Raises OSError, ValueError or SafetensorError for a file that is none.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        names, top = json.loads(metadata.get("names", "[]")), float(json.loads(metadata.get("top", "0")))
        if not isinstance(names, list) or len(names) < 2:
            raise ValueError("it names no two rows of samples")
        images = [file.get_tensor(f"{i}") for i in range(len(names))]
        errors = [file.get_tensor(f"{i}.error") for i in range(1, len(names))]
    count, room = 0, ON_PAGE
    rows: list[dict[str, Any]] = [
        {"name": str(name), "setting": str(said), "images": [], "errors": []} for name, said in names
    ]
    while count < len(images[0]) and (room > 0 or not count):
        for row, image in zip(rows, images, strict=True):
            row["images"].append(_uri(image[count]))
        for row, error in zip(rows[1:], errors, strict=True):
            row["errors"].append(_uri(error[count][None]))
        room -= sum(len(row[kind][count]) for row in rows for kind in ("images", "errors") if row[kind])
        count += 1
    height, width = images[0].shape[-2:]
    return {"rows": rows, "top": top, "count": count, "height": height, "width": width, "first_seed": 50_000}


def _bytes(x: Tensor) -> Tensor:
    return (x.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()


def _uri(image: Tensor) -> str:
    """[C, H, W] in 8 bits as a data URI."""
    array = np.ascontiguousarray(image.permute(1, 2, 0).squeeze(-1).numpy())
    kind, options = ("PNG", {"optimize": True}) if max(array.shape[:2]) <= LOSSLESS else ("JPEG", {"quality": 90})
    data = io.BytesIO()
    Image.fromarray(array).save(data, kind, **options)  # type: ignore[arg-type]
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
