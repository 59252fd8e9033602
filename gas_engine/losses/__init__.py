"""Losses: what a student is asked to match."""

from .distillation import LOSSES, distillation_loss

__all__ = ["LOSSES", "distillation_loss"]
