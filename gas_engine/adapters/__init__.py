"""Real models -> ``Denoiser``."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..denoiser import Denoiser, EDMDenoiser
from .digits import DIGITS, load_digits
from .edm import at_resolution, load_edm
from .factory import load_factory
from .photos import load_photos

__all__ = ["load_denoiser", "load_digits", "load_edm", "load_factory", "load_photos"]

EMBEDDED: dict[str, Callable[[], EDMDenoiser]] = {name: partial(load_digits, name) for name in DIGITS}
EMBEDDED["photos"] = load_photos


def load_denoiser(
    name: str, resolution: int | None = None, *, text_length: int | None = None, dtype: torch.dtype | None = None
) -> Denoiser:
    """Load a frozen model, on the CPU.

    | name | what it is |
    |---|---|
    | ``digits``, ``photos`` | the embedded models: 8x8 digits with classes, 32x32 photographs without |
    | ``digits-guided`` | the digits by a network that can do without a class, for guidance |
    | ``*.pkl``, ``*.safetensors`` | an EDM network: a published pickle, or what ``convert`` made of one |
    | ``*.ckpt``, or a directory with one | an LDM checkpoint beside its YAML |
    | a directory, ``owner/name`` | a diffusers pipeline, of the disk or of the Hub |
    | ``module:factory`` | any importable function that takes nothing and returns a ``Denoiser`` |

    ``resolution``: pixels a side, of a pipeline's or an EDM network's pictures (the embedded ones are such); the
    network's own unless given. At another the denoiser's name says so, since what it makes is another distribution.
    ``text_length``: tokens of a text for its T5 encoder. ``dtype``: that a pipeline's weights are read in, float32
    unless given. Nothing in a file is executed.
    Raises ValueError, with what was found and what is accepted, for anything else, and for truncated or foreign files.

        denoiser = load_denoiser("digits")
    """
    path = Path(name)
    hub = not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not path.suffix[1:].isalpha()
    if name not in EMBEDDED and (path.is_dir() or hub) and not list(path.glob("*.ckpt")):
        from .diffusers import load_diffusers
        from .text import conditioning_of

        denoiser = load_diffusers(name, resolution=resolution, dtype=dtype)
        denoiser.conditioning = conditioning_of(denoiser, length=text_length)
        return denoiser
    if text_length is not None:
        raise ValueError(f"a text length of {text_length} was given, but {name} takes no text; leave it out")
    if name in EMBEDDED:
        return at_resolution(EMBEDDED[name](), resolution)
    latent = path.is_dir() or path.suffix == ".ckpt"
    if not latent and (path.suffix in (".safetensors", ".pkl") or path.exists()):
        return at_resolution(load_edm(path), resolution)
    if resolution is not None:
        raise ValueError(f"a resolution of {resolution} was given, but {name} has one of its own; leave it out")
    if latent:
        from .ldm import load_ldm

        return load_ldm(path)
    if ":" in name:
        return load_factory(name)
    raise ValueError(
        f"unknown model {name!r}: give {', '.join(map(repr, EMBEDDED))}, a .pkl or .safetensors of an EDM network, an "
        "LDM .ckpt, a diffusers directory or Hub id, or 'module:factory' for a function that returns a "
        "gas_engine.Denoiser"
    )
