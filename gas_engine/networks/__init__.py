"""Networks that the engine owns."""

from .edm_unet import build_edm

__all__ = ["build_edm"]
