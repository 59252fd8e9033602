"""Bytes and seconds of one training iteration, for a way to run it.

    bytes    = weights + inputs + max(forward, loss, backward, before)         (the phases of ``rehearse``)
    seconds  = sum over micro-batches of  (2 C - kept) F + C B + loss + transfers, and what runs before

C = K T network calls, T = 2 where guidance is split; F and B the seconds of a call's forward and backward pass: its
operations times a launch, plus its floating point operations over the device's rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.utils._pytree import tree_leaves

from .costs import Loss, Probe
from .execution import Weights
from .memory import MemoryPolicy
from .rehearsal import PHASES, Peaks


@dataclass(frozen=True)
class Speed:
    """A device, as far as the order of plans depends on it: operations and bytes per second, seconds per launch.

    ``host``: between host and device; ``memory``: on the device, for dequantised weights.
    """

    flops: float = 5e13
    launch: float = 1e-5
    host: float = 2.4e10
    memory: float = 1e12


@dataclass(frozen=True)
class Beside:
    """What runs beside the solver's gradient, such as a discriminator: a step before it, and a part of its loss.

    ``bytes``: alive all the time. ``samples``: bytes of the samples that the step before needs, drawn in micro-batches
    by ``evaluations`` calls each without gradients; ``step``, ``flops``: bytes at most and operations of the step, once
    they are there. ``loss``: what it adds to the loss.
    """

    bytes: int = 0
    samples: int = 0
    evaluations: int = 0
    step: int = 0
    flops: int = 0
    loss: Loss | None = None


@dataclass(frozen=True)
class Way:
    """A plan without its micro-batch: peaks of micro-batches of 1 and 2."""

    memory: MemoryPolicy
    blocks: str
    terms: int
    one: Peaks
    two: Peaks

    def peaks(self, batch: int) -> Peaks:
        return Peaks(*(self.one[name] + (batch - 1) * (self.two[name] - self.one[name]) for name in PHASES))


@dataclass(frozen=True)
class Iteration:
    """One training iteration, as far as it is the same for all ways to run it.

    ``together``: network calls of one evaluation, 2 with guidance, else 1; they run as one call unless split.
    ``held_bytes``: of the loss's own weights and of libraries. ``evaluation_seconds``: measured, of a plain evaluation
    of the batch.
    """

    probe: Probe
    steps: int
    batch: int
    lean: bool
    weights: tuple[Weights, ...]
    together: int
    loss_flops: int
    held_bytes: int
    speed: Speed
    evaluation_seconds: float | None
    beside: Beside = Beside()

    @cached_property
    def input_bytes(self) -> int:
        """Noise and targets (float32), and conditions, of the whole batch."""
        leaves = tree_leaves(self.probe.cond_of(1))
        per_sample = 8 * math.prod(self.probe.shape) + sum(c.nbytes for c in leaves if isinstance(c, Tensor))
        return per_sample * self.batch

    def weight_bytes(self, weights: Weights) -> int:
        """Resident: all of them, buffers too. Streamed: what is in no block, and the three largest blocks. Quantised:
        the matrices of linear layers at a byte, or half of one, with scales (one for each row, or float32 for each 64
        numbers), and the largest such layer while it is used."""
        probe, others = self.probe, self.held_bytes + self.beside.bytes
        if weights == "resident":
            return probe.weights + others
        if weights == "streamed":
            return probe.weights - sum(probe.blocks) + sum(probe.blocks[-3:]) + others
        numbers, others = probe.matrix_numbers, others + probe.weights - probe.matrix_bytes
        scale = probe.matrix_bytes // max(numbers, 1)
        packed = numbers + scale * probe.matrix_rows if weights == "int8" else numbers // 2 + 4 * (numbers // 64)
        return packed + others + max(probe.layers, default=0)

    def forward_seconds(self, blocks: str, batch: int) -> float:
        cost = self.probe.cost(self.lean, blocks, batch)
        return cost.operations * self.speed.launch + cost.forward_flops / self.speed.flops

    def seconds(self, way: Way, weights: Weights, micro: int) -> float:
        """Of one iteration, by the formula at the top of this file."""
        full, rest = divmod(self.batch, micro)
        before = self.beside.flops / self.speed.flops
        before += self.beside.evaluations * self.forward_seconds("none", self.together * self.batch)
        return before + sum(
            times * self._micro_seconds(way, weights, size) for times, size in ((full, micro), (1, rest)) if size
        )

    def _micro_seconds(self, way: Way, weights: Weights, micro: int) -> float:
        speed, calls = self.speed, self.steps * way.terms
        batch = micro * self.together // way.terms
        cost = self.probe.cost(self.lean, way.blocks, batch)
        forward = self.forward_seconds(way.blocks, batch)
        backward = cost.backward_operations * speed.launch + cost.backward_flops / speed.flops
        # Weights travel while the layer before is computed; they are unpacked in between.
        travel = self.probe.weights / speed.host if weights == "streamed" else 0.0
        unpack = self.probe.matrix_bytes / speed.memory if weights in ("int8", "nf4") else 0.0
        kept = way.memory.kept(calls)
        seconds = 0.0
        if way.blocks == "auto" and kept > 1:  # a call's last block is rebuilt too where another call came after it
            older = self.probe.cost(self.lean, "all", batch)
            seconds += (kept - 1) * (older.backward_flops - cost.backward_flops) / speed.flops
        again = 2 if way.blocks == "nested" else 1  # times that a backward pass wants a block's weights
        seconds += (2 * calls - kept) * (max(forward, travel) + unpack)
        seconds += calls * (max(backward, again * travel) + again * unpack)
        if way.memory.trajectory == "offload":
            seconds += 2 * (self.steps + 1) * 4 * math.prod(self.probe.shape) * micro / speed.host
        return seconds + micro * self.loss_flops / speed.flops
