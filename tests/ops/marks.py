"""Parameters and marks of the tests of ops: on a device, and with the native core."""

from __future__ import annotations

import pytest
import torch

from gas_engine.ops import _native

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run bench/gpu.sh on one"),
    ],
)
DEVICES = ["cpu", CUDA]
needs_core = pytest.mark.skipif(
    _native.native is None, reason="the native core is off: the twins are no registered ops"
)
