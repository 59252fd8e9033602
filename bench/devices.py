"""Where a bench of an op runs, and at which sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run bench/gpu.sh on one"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def sizes_on_devices(sizes: Iterable[Any], large: Iterable[Any] = ()) -> list[Any]:
    """Values of ("size", "device"): the sizes on both, and on a device also what is several times its cache."""
    cases = [(size, "cpu", []) for size in sizes] + [(size, "cuda", GPU) for size in (*sizes, *large)]
    return [pytest.param(size, device, marks=marks, id=f"{size}-{device}") for size, device, marks in cases]
