"""The training gradient rehearsed: real sampling loop, real states, and a network that only takes up its room.

Stand-ins for the network and the loss allocate the bytes that theirs were measured to take, as tensors of no memory,
while ``loss_backward`` itself runs: so states, outputs, cotangents and the order of it all are not modelled, but there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .costs import CallCost, Probe
from .denoiser import Denoiser
from .gradients import loss_backward
from .memory import ByteTracker, MemoryPolicy
from .tableau import Tableau

PHASES = ("forward", "loss", "backward")


@dataclass(frozen=True)
class Peaks:
    """Bytes at most alive in each phase of a training gradient, beyond weights, noise, targets and conditions."""

    forward: int
    loss: int
    backward: int

    def __getitem__(self, name: str) -> int:
        return getattr(self, name)

    @property
    def largest(self) -> int:
        return max(self.forward, self.loss, self.backward)


def rehearse(
    probe: Probe, tableau: Tableau, batch: int, memory: MemoryPolicy, lean_ops: bool, blocks: str, loss_peak: int,
    guide: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
) -> Peaks:  # fmt: skip
    """Peaks of ``loss_backward`` for one micro-batch of a view of the probe's denoiser.

    ``loss_peak``: of this batch, as ``Probe.loss_cost`` gives it. ``guide`` puts the stand-in into the denoiser that
    is trained, such as a guided one.
    """
    for kind in {blocks, "all"} if blocks == "auto" else {blocks}:
        probe.cost(lean_ops, kind, 1), probe.cost(lean_ops, kind, 2)  # before the tracker looks
    play = _Play(probe, batch, lean_ops, blocks, loss_peak)
    like = probe.denoiser
    network = Denoiser(play.network, like.schedule, like.prediction, like.shape)
    x, cond = torch.zeros(batch, *probe.shape), probe.cond_of(batch)
    # The tableau's own graph can be walked once; here many gradients are asked for.
    assert tableau.c_in is not None
    wanted = ("A", "B", "t_net", *(["c_in"] if tableau.c_in.requires_grad else []))
    tableau = replace(tableau, **{name: getattr(tableau, name).detach().requires_grad_() for name in wanted})
    with play.tracker:
        loss_backward(guide(network), x, tableau, play.loss, cond, memory)
        play.enter("end")
    return Peaks(**play.peaks)


class _Play:
    """Who plays the network and the loss, and writes down the peak of each phase."""

    def __init__(self, probe: Probe, batch: int, lean_ops: bool, blocks: str, loss_peak: int) -> None:
        self.cost: Callable[[int], CallCost] = lambda n: probe.cost(lean_ops, blocks, n)
        # The last block of a call is kept until another call begins.
        self.later: Callable[[int], CallCost] = lambda n: probe.cost(lean_ops, "all" if blocks == "auto" else blocks, n)
        self.batch, self.loss_peak, self.tracker = batch, loss_peak, ByteTracker()
        self.newest: Callable[[], _Graph | None] = lambda: None
        self.phase, self.peaks = "forward", dict[str, int]()

    def enter(self, phase: str) -> None:
        """A network call after the loss belongs to the backward pass."""
        if phase == "network":
            phase = "forward" if self.phase == "forward" else "backward"
        if phase != self.phase:
            self.peaks[self.phase] = self.tracker.peak
            self.tracker.reset_peak()
            self.phase = phase

    def network(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.enter("network")
        cost = self.cost(len(x))
        if not torch.is_grad_enabled():
            allocate(cost.plain_peak)
            return _output(x, cost)
        if (previous := self.newest()) is not None:
            previous.hold(self.later(previous.batch))
        # Within a larger graph, which calls the network with a larger batch, nobody holds the cotangent.
        graph = _Graph(len(x), inner=len(x) != self.batch)
        self.newest = weakref.ref(graph)
        return _Call.apply(x, t, cost, graph, self)

    def loss(self, x: Tensor, rows: slice) -> Tensor:
        self.enter("loss")
        return _Loss.apply(x, self.loss_peak)


class _Graph:
    """What a call keeps, and what its backward pass takes on top."""

    def __init__(self, batch: int, inner: bool) -> None:
        self.batch, self.inner = batch, inner

    def hold(self, cost: CallCost) -> None:
        self.kept = None
        self.kept = allocate(cost.kept - cost.output)
        self.more = max(0, (cost.inner_peak if self.inner else cost.backward_peak) - cost.kept)


def allocate(size: int) -> Tensor:
    """Bytes that are counted, and are nowhere."""
    return torch.empty(size, dtype=torch.uint8, device="meta")


def _output(x: Tensor, cost: CallCost) -> Tensor:
    """Zeros like x, perhaps a part of something larger."""
    return torch.zeros(cost.output, dtype=torch.uint8).view(cost.dtype)[: x.numel()].view(x.shape)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, cost: CallCost, graph: _Graph, play: _Play) -> Tensor:  # type: ignore[override]
        allocate(cost.forward_peak)
        graph.hold(cost)
        ctx.graph, ctx.play, ctx.like = graph, play, (x.shape, x.dtype)
        ctx.save_for_backward(*([x] if cost.keeps_input else []))
        return _output(x, cost)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.play.enter("network")
        allocate(ctx.graph.more)
        ctx.graph = None
        (shape, dtype), (by_x, by_t, *_) = ctx.like, ctx.needs_input_grad
        d_x = torch.zeros(shape, dtype=dtype) if by_x else None
        return d_x, torch.zeros((), dtype=torch.float64) if by_t else None, None, None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peak: int) -> Tensor:  # type: ignore[override]
        allocate(peak)
        ctx.like = x.shape, x.dtype
        return torch.zeros(len(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shape, dtype = ctx.like
        return torch.zeros(shape, dtype=dtype), None
