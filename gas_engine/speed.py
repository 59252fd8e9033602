"""`compiled` and `captured`: views of a frozen network whose calls are one piece of code, or one CUDA graph.

A rebuilt evaluation must be the first one to the bit, and a compiler makes one piece of code for a forward pass that
is differentiated and another for one that is not. So both views always run the former: every call is recorded on the
tape for x and t, wanted or not, and what nobody wants dies with the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .denoiser import Denoiser
from .memory._view import Forward, Make, made, view
from .memory.precision import core

__all__ = ["captured", "compiled"]

GRAPHS_ON = "cuda"


def compiled(denoiser: Denoiser, **options: Any) -> Denoiser:
    """A view of a denoiser whose network runs through ``torch.compile(**options)``; scalings around it stay eager.

    The same code for sampling, for the forward pass and for what the backward pass rebuilds: once for each shape of
    input, whatever the number of steps, since a time is a tensor. Numbers are the network's own to rounding.
    Memory: a call takes that of its graph, also where no gradient is wanted; the compiler chooses what a graph keeps.
    Raises RuntimeError for trainable weights; the compiler's own errors come with the first call.

        fast = compiled(denoiser)
    """
    return _with_network(denoiser, lambda forward: torch.compile(forward, dynamic=False, **options), "compiled")


def captured(denoiser: Denoiser) -> Denoiser:
    """A view of a denoiser on a CUDA device whose network's forward and backward pass are replayed as CUDA graphs.

    For small networks, whose kernels take less time than their launches. A shape of input is captured at its first
    call. The graph's memory is the same at every replay: one call's graph may be alive at a time, and a second call
    writes over the first's (``MemoryPolicy(checkpoint_every=1)``).
    Memory: for each shape of input, that of one call with its graph and backward pass, for as long as the view lives.
    Raises RuntimeError for trainable weights; ValueError at a call whose tensors are not on a CUDA device.

        fast = captured(denoiser.to("cuda"))
    """
    return _with_network(denoiser, _Captured, "captured")


def _with_network(denoiser: Denoiser, change: Callable[[Forward], Forward], caller: str) -> Denoiser:
    middle, base = core(denoiser), denoiser.base

    def rule(module: nn.Module) -> Make | None:
        inner = made(module)
        if module is middle is base:
            return lambda m: _taped(change(inner(m)))
        if module is base:
            return lambda m: _taped(inner(m))
        return (lambda m: change(inner(m))) if module is middle else None

    result = view(denoiser, rule, caller)
    assert isinstance(result, Denoiser)
    return result


def _taped(forward: Forward) -> Forward:
    """The forward of a denoiser, on the tape for x and t whoever calls."""

    def call(x: Tensor, t: Tensor, cond: Any = None) -> Any:
        wanted = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
        with torch.enable_grad():
            output = forward(*(v if wanted and v.requires_grad else v.detach().requires_grad_() for v in (x, t)), cond)
        return output if wanted else output.detach()

    return call


class _Captured:
    """A forward as CUDA graphs, one pair for each kind of arguments."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.graphs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in at]
        elsewhere = next((t.device for t in tensors if t.device.type != GRAPHS_ON), None)
        if elsewhere is not None:
            raise ValueError(f"CUDA graphs need all of the network's inputs on a CUDA device, got one on {elsewhere}")
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        kinds = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]
        key = (spec, *others, *kinds)
        if key not in self.graphs:

            def forward(*tensors: Tensor) -> Any:
                here = [*others]
                for i, t in zip(at, tensors, strict=True):
                    here[i] = t
                args, kwargs = tree_unflatten(here, spec)
                return self.forward(*args, **kwargs)

            samples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
            self.graphs[key] = torch.cuda.make_graphed_callables(forward, samples, allow_unused_input=True)
        # The next replay writes over results and gradients alike.
        return tree_map(torch.clone, self.graphs[key](*(_OwnGradient.apply(t) for t in tensors)))


class _OwnGradient(torch.autograd.Function):
    """The identity, whose gradient gets a memory of its own."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:  # type: ignore[override]
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g.clone()
