"""Real models -> ``Denoiser``."""

from __future__ import annotations

from pathlib import Path

from ..denoiser import Denoiser
from .digits import load_digits
from .edm import load_edm
from .factory import load_factory

__all__ = ["load_denoiser", "load_digits", "load_edm", "load_factory"]


def load_denoiser(name: str, resolution: int | None = None) -> Denoiser:
    """Load a frozen model: ``"digits"`` (embedded), a ``.safetensors`` EDM network, or ``"module:factory"``.

    A factory is any importable function that takes nothing and returns a ``Denoiser``. Raises ValueError, with what
    was found and what is accepted, for anything else, and for truncated or foreign files.

        denoiser = load_denoiser("digits")
    """
    if name == "digits":
        return load_digits()
    if Path(name).suffix == ".safetensors" or Path(name).exists():
        return load_edm(Path(name))
    if ":" in name:
        return load_factory(name)
    raise ValueError(
        f"unknown model {name!r}: give 'digits', the path of a .safetensors EDM network, or 'module:factory' for a "
        "function that returns a gas_engine.Denoiser"
    )
