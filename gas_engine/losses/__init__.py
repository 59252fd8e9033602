"""Losses: what a student is asked to match."""

from .adversarial import DiscriminatorLosses, discriminator_loss, generator_loss
from .distillation import LOSSES, distillation_loss

__all__ = ["LOSSES", "DiscriminatorLosses", "discriminator_loss", "distillation_loss", "generator_loss"]
