"""Memory: what the backward pass keeps, and how to count it."""

from .lean import Coverage, lean
from .policy import MemoryPolicy
from .tracker import ByteTracker, phase

__all__ = ["ByteTracker", "Coverage", "MemoryPolicy", "lean", "phase"]
