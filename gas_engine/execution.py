"""`Execution`: how an update runs, whatever it computes; and the next cheaper way, for when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import nn

from .denoiser import Denoiser
from .memory import MemoryPolicy, cast, checkpoint_blocks, lean, quantize_weights, stream_weights
from .speed import captured, compiled

Weights = Literal["resident", "streamed", "int8", "nf4"]
BLOCKS = ("none", "auto", "all", "nested")
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Execution:
    """What a gradient of a solver takes in memory and time, and none of its value.

    ``memory``: the policy of the rollout. ``micro_batch``: samples at a time, None for all. ``lean``: the network's
    graph keeps only what an input gradient needs. ``blocks``: "none", "auto" or "all" of its blocks are rebuilt in the
    backward pass, or with "nested" most of their inputs too. ``weights``: "resident", "int8" or "nf4" (linear layers in
    eight or four bits, an approximation), or "streamed" from host memory block by block, which rebuilds the blocks as
    well. ``precision``: of the network's weights and arithmetic, "fp32" as the model has them, or narrower, an
    approximation; states and told times keep theirs. ``channels_last``: the layout of its images. ``compile``: the
    network through torch.compile, which then chooses what a graph keeps. ``cuda_graphs``: its calls replayed as CUDA
    graphs, one network graph at a time. The latter two run no blocks.

        execution = Execution(MemoryPolicy(1), micro_batch=4, lean=True, blocks="auto")
        loss_backward(execution.view(denoiser), x, tableau, loss, cond, execution.memory, execution.micro_batch)
    """

    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    micro_batch: int | None = None
    lean: bool = False
    blocks: str = "none"
    weights: Weights = "resident"
    precision: Precision = "fp32"
    channels_last: bool = False
    compile: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if self.blocks not in BLOCKS:
            raise ValueError(f"blocks must be one of {', '.join(BLOCKS)}, got {self.blocks!r}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.precision not in DTYPES:
            raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {self.precision!r}")
        if self.weights == "streamed" and self.blocks == "none":
            object.__setattr__(self, "blocks", "auto")
        for name, on in (("compile", self.compile), ("cuda_graphs", self.cuda_graphs)):
            if on and (self.blocks != "none" or self.weights not in ("resident", "int8")):
                raise ValueError(
                    f"{name} makes one piece of a network's call, and blocks={self.blocks!r} with {self.weights} "
                    f"weights run it block by block; leave out one or the other"
                )
        if self.compile and (self.cuda_graphs or self.lean):
            other = "cuda_graphs replays" if self.cuda_graphs else "lean chooses"
            raise ValueError(
                f"compile makes the network's code and chooses what its graph keeps, and {other} another; leave out one"
            )
        if self.cuda_graphs and self.memory.checkpoint_every != 1:
            raise ValueError(
                "cuda_graphs has the memory of one network graph, so checkpoint_every must be 1, "
                f"got {self.memory.checkpoint_every}"
            )

    def place(self, denoiser: Denoiser, device: torch.device | str) -> Denoiser:
        """The denoiser computing on ``device`` with its weights where and as they belong; the first of the two views.

        Raises ValueError where a plain function hides the network, and for CUDA graphs on another device.
        """
        if self.cuda_graphs and torch.device(device).type != "cuda":
            raise ValueError(f"cuda_graphs needs a CUDA device, got {device}; leave it out")
        narrow = self.precision != "fp32"
        if self.weights == "resident" and not narrow and not self.channels_last:
            return denoiser.to(device)
        _check_viewable(denoiser)
        if narrow or self.channels_last:
            dtype, there = DTYPES[self.precision] if narrow else None, device if self.weights == "resident" else None
            denoiser = cast(denoiser.requires_grad_(False), dtype, there, self.channels_last)  # type: ignore[assignment]
            if self.weights == "resident":
                return denoiser
        if self.weights == "streamed":
            placed: nn.Module = stream_weights(denoiser.requires_grad_(False), device)
        else:
            placed = quantize_weights(denoiser.requires_grad_(False), device, self.weights)
        assert isinstance(placed, Denoiser)
        return placed

    def view(self, denoiser: Denoiser) -> Denoiser:
        """The (placed) denoiser with its network seen leanly, in blocks, compiled or captured, for training.

        Raises ValueError where a plain function hides the network.
        """
        if not (self.lean or self.compile or self.cuda_graphs) and self.blocks == "none":
            return denoiser
        _check_viewable(denoiser)
        network: nn.Module = lean(denoiser) if self.lean else denoiser
        if self.blocks != "none":
            network = checkpoint_blocks(network, self.blocks)
        assert isinstance(network, Denoiser)
        if self.compile:
            return compiled(network)
        return captured(network) if self.cuda_graphs else network

    def cheaper(self, denoiser: Denoiser, batch: int) -> Iterator[Execution]:
        """Ways that take fewer bytes, the ones that cost the least time first."""
        now = self
        if now.cuda_graphs:  # which hold a graph all the time
            now = replace(now, cuda_graphs=False)
            yield now
        if now.memory.checkpoint_every != 1:
            now = replace(now, memory=replace(now.memory, checkpoint_every=1))
            yield now
        if not now.lean and not now.compile and viewable(denoiser):
            now = replace(now, lean=True)
            yield now
        size = min(now.micro_batch or batch, batch)
        while size > 1:
            size = -(-size // 2)
            now = replace(now, micro_batch=size)
            yield now
        if denoiser.calls > 1 and not now.memory.split_guidance:
            now = replace(now, memory=replace(now.memory, split_guidance=True))
            yield now
        if now.blocks == "none" and viewable(denoiser):
            now = replace(now, blocks="auto", compile=False)
            yield now
        if not now.memory.loss_alone:
            now = replace(now, memory=replace(now.memory, loss_alone=True))
            yield now
        if now.memory.trajectory == "keep":
            now = replace(now, memory=replace(now.memory, trajectory="offload"))
            yield now
        if now.blocks != "nested" and viewable(denoiser):
            yield replace(now, blocks="nested")

    def __str__(self) -> str:
        memory = self.memory
        said = [f"micro-batch {self.micro_batch or 'all'}", f"{memory.checkpoint_every or 'all'} graph(s)"]
        said += [word for word, on in (("lean", self.lean), (f"blocks {self.blocks}", self.blocks != "none")) if on]
        said += [f"{self.weights} weights"] if self.weights != "resident" else []
        said += [self.precision] if self.precision != "fp32" else []
        said += [word for word in ("channels_last", "compile", "cuda_graphs") if getattr(self, word)]
        said += [f"trajectory {memory.trajectory}"] if memory.trajectory != "keep" else []
        said += [word for word in ("split_guidance", "loss_alone") if getattr(memory, word)]
        return ", ".join(said).replace("_", " ")


def _check_viewable(denoiser: Denoiser) -> None:
    if not viewable(denoiser):
        raise ValueError(hidden(denoiser))


def hidden(denoiser: Denoiser) -> str:
    """Why no view of this network can be made, and what to do."""
    return (
        f"the function of {denoiser.name} closes over its network, so no view of the network (lean, blocks, compiled, "
        "with streamed, int8 or narrower weights) can take its place; make the function an nn.Module that holds the "
        "network, or derive from Denoiser"
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
