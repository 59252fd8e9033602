"""Memory: what the backward pass keeps."""

from .policy import MemoryPolicy

__all__ = ["MemoryPolicy"]
