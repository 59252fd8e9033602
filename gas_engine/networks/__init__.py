"""Networks that the engine owns."""

from .preconditioning import EDMNetwork, build_edm

__all__ = ["EDMNetwork", "build_edm"]
