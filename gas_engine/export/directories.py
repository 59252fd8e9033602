"""Directories that other programs take as they are."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import write_json, write_text
from .numbers import Solvers, for_diffusers, for_sigma_space

HERE = Path(__file__).parent


def write_diffusers(solvers: Solvers, prediction: str, out: Path) -> Path:
    """``scheduler_config.json`` and ``gas_scheduler.py``, without diffusers; what ``GASScheduler`` saves and reads."""
    config = {"_class_name": "GASScheduler", **for_diffusers(solvers, prediction)}
    write_text(out / "gas_scheduler.py", (HERE / "diffusers_scheduler.py").read_text())
    write_json(out / "scheduler_config.json", config)
    return out


def write_comfyui(solvers: Solvers, out: Path) -> Path:
    """A folder for ComfyUI/custom_nodes: ``__init__.py``, ``k_diffusion.py``, ``solvers.json``."""
    numbers = for_sigma_space(solvers)
    write_text(out / "__init__.py", (HERE / "comfyui.py").read_text())
    write_text(out / "k_diffusion.py", (HERE / "k_diffusion.py").read_text())
    write_text(out / "solvers.json", json.dumps(numbers) + "\n")
    return out
