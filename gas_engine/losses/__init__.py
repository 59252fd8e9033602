"""Losses: what a student is asked to match."""

from .decoders import VAE, decoded
from .distillation import LOSSES, DistillationLoss, distillation_loss

__all__ = ["LOSSES", "VAE", "DistillationLoss", "decoded", "distillation_loss"]
