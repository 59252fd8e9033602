"""`Execution`: how an update runs, whatever it computes; and the next cheaper way, for when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import nn

from .denoiser import Denoiser
from .memory import MemoryPolicy, checkpoint_blocks, lean, quantize_weights, stream_weights

Weights = Literal["resident", "streamed", "int8", "nf4"]
BLOCKS = ("none", "auto", "all")
WEIGHTS: tuple[Weights, ...] = get_args(Weights)


@dataclass(frozen=True)
class Execution:
    """What a gradient of a solver takes in memory and time, and none of its value.

    ``memory``: the policy of the rollout. ``micro_batch``: samples at a time, None for all. ``lean``: the network's
    graph keeps only what an input gradient needs. ``blocks``: "none", "auto" or "all" of its blocks are rebuilt in the
    backward pass. ``weights``: "resident", "int8" (linear layers in eight bits, an approximation), or "streamed" from
    host memory block by block, which rebuilds the blocks as well; "nf4" (four bits) can be planned, and not run yet.

        execution = Execution(MemoryPolicy(1), micro_batch=4, lean=True, blocks="auto")
        loss_backward(execution.view(denoiser), x, tableau, loss, cond, execution.memory, execution.micro_batch)
    """

    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    micro_batch: int | None = None
    lean: bool = False
    blocks: str = "none"
    weights: Weights = "resident"

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if self.blocks not in BLOCKS:
            raise ValueError(f"blocks must be one of {', '.join(BLOCKS)}, got {self.blocks!r}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.weights == "streamed" and self.blocks == "none":
            object.__setattr__(self, "blocks", "auto")

    def place(self, denoiser: Denoiser, device: torch.device | str) -> Denoiser:
        """The denoiser computing on ``device`` with its weights where they belong; the first of the two views."""
        if self.weights == "resident":
            return denoiser.to(device)
        _check_viewable(denoiser)
        if self.weights == "nf4":
            raise ValueError("four-bit weights (nf4) can be planned but not run yet; use int8 or streamed weights")
        if self.weights == "streamed":
            placed: nn.Module = stream_weights(denoiser.requires_grad_(False), device)
        else:
            placed = quantize_weights(denoiser.requires_grad_(False), device)
        assert isinstance(placed, Denoiser)
        return placed

    def view(self, denoiser: Denoiser) -> Denoiser:
        """The (placed) denoiser with its network seen leanly and in blocks, for training.

        Raises ValueError where a plain function hides the network.
        """
        if not self.lean and self.blocks == "none":
            return denoiser
        _check_viewable(denoiser)
        network: nn.Module = lean(denoiser) if self.lean else denoiser
        if self.blocks != "none":
            network = checkpoint_blocks(network, self.blocks)
        assert isinstance(network, Denoiser)
        return network

    def cheaper(self, denoiser: Denoiser, batch: int) -> Iterator[Execution]:
        """Ways that take fewer bytes, the ones that cost the least time first."""
        now = self
        if now.memory.checkpoint_every != 1:
            now = replace(now, memory=replace(now.memory, checkpoint_every=1))
            yield now
        if not now.lean and viewable(denoiser):
            now = replace(now, lean=True)
            yield now
        size = min(now.micro_batch or batch, batch)
        while size > 1:
            size = -(-size // 2)
            now = replace(now, micro_batch=size)
            yield now
        if len(denoiser.terms(None)) > 1 and not now.memory.split_guidance:
            now = replace(now, memory=replace(now.memory, split_guidance=True))
            yield now
        if now.blocks == "none" and viewable(denoiser):
            now = replace(now, blocks="auto")
            yield now
        if not now.memory.loss_alone:
            now = replace(now, memory=replace(now.memory, loss_alone=True))
            yield now
        if now.memory.trajectory == "keep":
            yield replace(now, memory=replace(now.memory, trajectory="offload"))

    def __str__(self) -> str:
        memory = self.memory
        said = [f"micro-batch {self.micro_batch or 'all'}", f"{memory.checkpoint_every or 'all'} graph(s)"]
        said += [word for word, on in (("lean", self.lean), (f"blocks {self.blocks}", self.blocks != "none")) if on]
        said += [f"{self.weights} weights"] if self.weights != "resident" else []
        said += [f"trajectory {memory.trajectory}"] if memory.trajectory != "keep" else []
        said += [word for word in ("split_guidance", "loss_alone") if getattr(memory, word)]
        return ", ".join(said).replace("_", " ")


def _check_viewable(denoiser: Denoiser) -> None:
    if not viewable(denoiser):
        raise ValueError(hidden(denoiser))


def hidden(denoiser: Denoiser) -> str:
    """Why no view of this network can be made, and what to do."""
    return (
        f"the function of {denoiser.name} closes over its network, so no view of the network (lean, blocks, streamed "
        "or int8 weights) can take its place; make the function an nn.Module that holds the network, or derive from "
        "Denoiser"
    )


def viewable(denoiser: Denoiser) -> bool:
    """Whether a view of the denoiser would be what is called: not where a plain function holds the network."""
    base = denoiser.base
    return base.function is None or isinstance(base.function, nn.Module)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left: torch's allocators, the driver, the libraries' workspaces."""
    words = ("out of memory", "can't allocate memory", "alloc_failed", "not_enough_workspace")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
    )
