"""What the backward pass keeps, rebuilds, offloads or reconstructs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from .reversal import BitsLost

Where = Literal["keep", "offload", "reversible"]


@dataclass(frozen=True)
class MemoryPolicy:
    """What lives between a rollout and its backward pass; the result is the same, only bytes and time differ.

    ``checkpoint_every=k``: at most k network graphs are alive. Those of the last k network calls are kept, the others
    are rebuilt one at a time in the backward pass (K-k extra calls of K). k = 0, or k >= K, keeps all K.

    ``trajectory``: where the states x[0..K] live. "keep": on the device, K+1 of them. "offload": in page-locked host
    memory, written while the next evaluation runs and streamed through a buffer of about one state; the device holds
    the newest state, output and cotangent. "reversible": two states, from which the others are walked back, with int8
    residual codes (a byte an element and step) that make it exact to the bit; the tableau must be a band of two
    (``BELMSolver``). ``carry=True`` holds the two in float64 instead, without codes, exact to float64's rounding.

    ``split_guidance``: the two calls of a guided denoiser run one after the other, each a graph of its own among the k
    (2K calls), instead of as one call of twice the batch. ``loss_alone``: no network graph survives the forward pass,
    so that the graph of the loss never lives beside one (K rebuilt calls instead of K-k).
    ``meter``: a ``BitsLost`` that counts what the codes hold.

    Raises ValueError for a negative or fractional k or an unknown trajectory, with the value seen.

        x = rollout(denoiser, noise, tableau, memory=MemoryPolicy(checkpoint_every=1, trajectory="offload"))
    """

    checkpoint_every: int = 1
    trajectory: Where = "keep"
    carry: bool = False
    split_guidance: bool = False
    loss_alone: bool = False
    meter: BitsLost | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if type(self.checkpoint_every) is not int or self.checkpoint_every < 0:
            raise ValueError(
                f"checkpoint_every must be 0 (keep all) or a positive integer, got {self.checkpoint_every!r}"
            )
        if self.trajectory not in get_args(Where):
            raise ValueError(f"trajectory must be one of {', '.join(get_args(Where))}, got {self.trajectory!r}")
        if self.carry and self.trajectory != "reversible":
            raise ValueError(f"carry=True belongs to trajectory='reversible', got trajectory={self.trajectory!r}")

    def kept(self, calls: int) -> int:
        """How many of ``calls`` network graphs survive the forward pass."""
        if self.loss_alone:
            return 0
        return calls if self.checkpoint_every == 0 else min(self.checkpoint_every, calls)
