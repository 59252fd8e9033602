"""One's own model: ``module:factory`` names a function that returns a ``Denoiser``."""

from __future__ import annotations

import importlib
import os
import sys

from ..denoiser import Denoiser


def load_factory(name: str) -> Denoiser:
    """Import ``module`` (the working directory counts) and call ``factory()``.

    Raises ValueError if either cannot be found or if what comes back is not a ``Denoiser``.
    """
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find the model {name!r}: {error}") from None
    finally:
        sys.path.pop(0)
    denoiser = factory()
    if not isinstance(denoiser, Denoiser):
        raise ValueError(f"{name!r} returned {type(denoiser).__name__}; it must return a gas_engine.Denoiser")
    if denoiser.name == "custom":
        denoiser.name = name
    # The command line never trains weights.
    return denoiser.eval().requires_grad_(False)
