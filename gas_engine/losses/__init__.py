"""Losses: what a student is asked to match."""

from .adversarial import DiscriminatorLosses, discriminator_loss, generator_loss
from .decoders import VAE, decoded
from .distillation import LOSSES, DistillationLoss, distillation_loss

__all__ = [
    "LOSSES",
    "VAE",
    "DiscriminatorLosses",
    "DistillationLoss",
    "decoded",
    "discriminator_loss",
    "distillation_loss",
    "generator_loss",
]
