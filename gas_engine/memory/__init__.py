"""Memory: what the backward pass keeps, and how to count it."""

from .blocks import Blocks, checkpoint_blocks
from .lean import Coverage, lean
from .policy import MemoryPolicy
from .precision import cast
from .reversal import BitsLost
from .sharding import shard_weights
from .tracker import ByteTracker, Reading, phase
from .weights import quantisable, quantize_weights, stream_weights

__all__ = [
    "BitsLost",
    "Blocks",
    "ByteTracker",
    "Coverage",
    "MemoryPolicy",
    "Reading",
    "cast",
    "checkpoint_blocks",
    "lean",
    "phase",
    "quantisable",
    "quantize_weights",
    "shard_weights",
    "stream_weights",
]
