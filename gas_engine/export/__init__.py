"""Solvers out: to diffusers, k-diffusion, ComfyUI, and the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

from .hub import push_to_hub, write_hub
from .k_diffusion import sample_gas
from .numbers import for_diffusers, for_sigma_space

__all__ = ["GASScheduler", "for_diffusers", "for_sigma_space", "push_to_hub", "sample_gas", "write_hub"]


def __getattr__(name: str) -> Any:
    if name != "GASScheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .diffusers_scheduler import GASScheduler
    except ImportError as error:
        raise ImportError(f"GASScheduler needs diffusers ({error}): `pip install diffusers`") from None
    return GASScheduler
