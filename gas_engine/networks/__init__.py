"""Networks that the engine owns."""

from .preconditioning import EDMNetwork, build_edm
from .r3gan import R3GANDiscriminator, discriminator_for

__all__ = ["EDMNetwork", "R3GANDiscriminator", "build_edm", "discriminator_for"]
