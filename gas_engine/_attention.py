"""Which attention kernels a gradient may run through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """Within, attention on a CUDA device runs by PyTorch's flash and memory-efficient kernels, never by cuDNN's.

    From 2.11 on PyTorch takes cuDNN first on Hopper and Blackwell, where its backward pass is known to give NaN for
    some masked lengths (pytorch issue 196678). Elsewhere nothing changes, and a choice by
    `torch.nn.attention.sdpa_kernel` among the other kernels holds.
    """
    allowed = device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled()
    if allowed:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if allowed:
            torch.backends.cuda.enable_cudnn_sdp(True)
