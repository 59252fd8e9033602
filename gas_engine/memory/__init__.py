"""Memory: what the backward pass keeps, and how to count it."""

from .lean import Coverage, lean
from .policy import MemoryPolicy
from .reversal import BitsLost
from .tracker import ByteTracker, phase

__all__ = ["BitsLost", "ByteTracker", "Coverage", "MemoryPolicy", "lean", "phase"]
