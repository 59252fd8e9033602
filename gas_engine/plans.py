"""Ways to run one training iteration, as plans: bytes, calls and predicted time, and which is the fastest that fits.

The ways are few (blocks, split guidance, kept graphs, trajectory, weights); each takes the largest micro-batch that
fits, since bytes are affine in it. Predicted times order them; ``iteration`` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .execution import WEIGHTS, Execution, Weights
from .iteration import Iteration, Way
from .memory import MemoryPolicy
from .rehearsal import PHASES, Peaks
from .units import show_bytes


@dataclass(frozen=True)
class Plan:
    """One way to run an iteration, and what it takes: ``execution`` is what to do.

    ``peaks``: bytes at most in each phase, ``before`` in what runs before them; ``weight_bytes`` (with what a loss, a
    discriminator and libraries hold), ``input_bytes`` (noise, targets, conditions of the whole batch) live all the
    time; ``bytes`` is the peak of all. ``calls``: network calls of an iteration, backward passes
    not counted. ``passes``: predicted time in plain evaluations of the whole batch, ``seconds`` where one such was
    measured.

        way = plan(denoiser, steps=10, batch=24, budget="8GiB").choice.execution
        losses = loss_backward(way.view(denoiser), x, tableau, loss, cond, way.memory, way.micro_batch)
    """

    micro_batch: int
    memory: MemoryPolicy
    lean: bool
    blocks: str
    weights: Weights
    peaks: Peaks
    before: int
    weight_bytes: int
    input_bytes: int
    calls: int
    passes: float
    seconds: float | None
    feasible: bool
    _plans: Plans = field(repr=False, compare=False)

    @property
    def bytes(self) -> int:
        """At the peak, weights and inputs of the batch included."""
        return max(self.peaks.largest, self.before) + self.weight_bytes + self.input_bytes

    @property
    def execution(self) -> Execution:
        """What runs the iteration so."""
        return replace(
            self._plans.like, memory=self.memory, micro_batch=self.micro_batch, lean=self.lean, blocks=self.blocks,
            weights=self.weights,
        )  # fmt: skip

    def cheaper(self, fraction: float = 0.85) -> Plan:
        """The fastest plan that needs at most this fraction of the bytes that are not weights.

        For the moment after an out-of-memory error. Raises ValueError if there is none.
        """
        fixed = self.weight_bytes
        return self._plans.within(fixed + int(fraction * (self.bytes - fixed))).choice

    def cheaper_ones(self) -> Iterator[Plan]:
        """``cheaper``, again and again."""
        plan = self
        while True:
            try:
                plan = plan.cheaper()
            except ValueError:
                return
            yield plan


class Plans(Sequence[Plan]):
    """Plans by predicted time, of each way to run the one with the largest micro-batch that fits (else 1).

    ``choice`` is the first feasible one. Raises ValueError there if no plan fits, with the smallest that there is.
    ``more``: measures further ways, which is done where some of the weights fit and no way to run them does.
    """

    def __init__(
        self, iteration: Iteration, ways: list[Way], budget: int, like: Execution, more: Callable[[], list[Way]] = list
    ) -> None:
        self.iteration, self.ways, self.budget, self.like, self.more = iteration, ways, budget, like, more
        self.plans = self._by_time()
        if more is not list and self._lacking():
            self.ways, self.more = [*ways, *more()], list
            self.plans = self._by_time()

    def __getitem__(self, index: Any) -> Any:
        return self.plans[index]

    def __len__(self) -> int:
        return len(self.plans)

    @cached_property
    def smallest(self) -> Plan:
        """The one with the fewest bytes, at a micro-batch of one."""
        alone = (self._plan(way, weights, 0) for weights, way in self._combinations())
        return min(alone, key=lambda plan: plan.bytes)

    @property
    def choice(self) -> Plan:
        found = next((plan for plan in self.plans if plan.feasible), None)
        if found is None:
            least = self.smallest
            others = [w for w in WEIGHTS if w not in self.iteration.weights]
            heavy = least.weight_bytes > least.peaks.largest and others
            raise ValueError(
                f"no plan fits into {show_bytes(self.budget)}: the smallest needs {show_bytes(least.bytes)} "
                f"({show_bytes(least.weight_bytes)} of {least.weights} weights, {show_bytes(least.input_bytes)} of "
                f"inputs, {show_bytes(max(least.peaks.largest, least.before))} for one sample at a time with "
                f"blocks={least.blocks!r}); "
                + (f"allow {' or '.join(others)} weights, or " if heavy else "")
                + "give a larger budget, a smaller batch or another dtype"
            )
        return found

    def within(self, budget: int) -> Plans:
        """The same ways for another budget; nothing is measured twice."""
        return Plans(self.iteration, self.ways, budget, self.like, self.more)

    def groups(self) -> list[Plan]:
        """For each weights, blocks, guidance and trajectory: the fastest that fits, else the smallest."""
        best: dict[Any, Plan] = {}
        for plan in self.plans:
            key = (plan.weights, plan.blocks, plan.memory.split_guidance, plan.memory.trajectory)
            held = best.get(key)
            if held is None or (not held.feasible and (plan.feasible or plan.bytes < held.bytes)):
                best[key] = plan
        return sorted(best.values(), key=lambda plan: (not plan.feasible, plan.passes, plan.bytes))

    def _by_time(self) -> list[Plan]:
        return sorted(
            (self._plan(way, weights, self.budget) for weights, way in self._combinations()),
            key=lambda plan: (plan.passes, WEIGHTS.index(plan.weights), plan.bytes),
        )

    def _lacking(self) -> bool:
        room, served = self.budget - self.iteration.input_bytes, {p.weights for p in self.plans if p.feasible}
        return any(self.iteration.weight_bytes(w) < room for w in self.iteration.weights if w not in served)

    def _combinations(self) -> Iterable[tuple[Weights, Way]]:
        for weights in self.iteration.weights:
            # A graph would keep streamed weights; blocks that are rebuilt let them go.
            yield from ((weights, way) for way in self.ways if weights != "streamed" or way.blocks != "none")

    def _plan(self, way: Way, weights: Weights, budget: int) -> Plan:
        it = self.iteration
        weight_bytes, one, two = it.weight_bytes(weights), way.one, way.two
        room, beside = budget - weight_bytes - it.input_bytes, it.beside
        most = it.batch if beside.samples + beside.step <= room else 0
        for name in PHASES:
            slope, free = two[name] - one[name], room - (beside.samples if name == "forward" else 0)
            fits = 1 + (free - one[name]) // slope if slope > 0 else it.batch * (one[name] <= free)
            most = min(most, fits)
        # As many micro-batches as it takes, of even sizes.
        micro = math.ceil(it.batch / math.ceil(it.batch / max(1, most)))
        calls = it.steps * way.terms
        passes = it.seconds(way, weights, micro) / it.forward_seconds("none", it.together * it.batch)
        seconds = None if it.evaluation_seconds is None else passes * it.evaluation_seconds
        peaks = way.peaks(micro)
        # Sampling takes less than a forward pass with its graph.
        before = beside.samples + max(beside.step, peaks.forward) if beside.samples else beside.step
        calls = (2 * calls - way.memory.kept(calls) + beside.evaluations) * math.ceil(it.batch / micro)
        return Plan(
            micro, way.memory, it.lean, way.blocks, weights, peaks, before, weight_bytes, it.input_bytes,
            calls, passes, seconds, most >= 1, self,
        )  # fmt: skip
