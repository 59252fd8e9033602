"""What the backward pass keeps and what it rebuilds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPolicy:
    """How many network graphs are alive during backpropagation through a sampler.

    ``checkpoint_every=k``: at most k graphs at once; the graphs of the last k evaluations are kept, the other K-k are
    rebuilt one at a time in the backward pass (K-k extra evaluations). k = 0, or k >= K, keeps all K. The default 1
    keeps one graph and the K+1 states. The result is the same bit for bit.

    Raises ValueError for a negative or fractional k.

        x = rollout(denoiser, noise, tableau, memory=MemoryPolicy(checkpoint_every=1))
    """

    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint_every, int) or self.checkpoint_every < 0:
            raise ValueError(
                f"checkpoint_every must be 0 (keep all) or a positive integer, got {self.checkpoint_every!r}"
            )

    def kept(self, steps: int) -> int:
        """How many of ``steps`` network graphs survive the forward pass."""
        return steps if self.checkpoint_every == 0 else min(self.checkpoint_every, steps)
