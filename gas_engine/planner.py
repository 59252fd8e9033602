"""From a budget in bytes to a way of running one training iteration: what is kept, rebuilt, offloaded, split.

The ways to run it are few (blocks, split guidance, kept graphs, trajectory, weights); each takes the largest
micro-batch that fits, since bytes are affine in it. Predicted times order them; ``iteration`` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .costs import Loss, Probe, loss_against_zeros
from .denoiser import Denoiser
from .execution import BLOCKS, DTYPES, WEIGHTS, Execution, Weights, hidden, viewable
from .guidance import GuidedDenoiser, guided
from .iteration import Beside, Iteration, Speed, Way
from .losses.distillation import DistillationLoss
from .memory import MemoryPolicy
from .rehearsal import PHASES, Peaks, rehearse
from .solvers import GeneralizedSolver
from .tableau import Tableau
from .units import parse_bytes, show_bytes

# Workspaces of cuBLAS, two handles of 32 MiB on Hopper, and of cuDNN: on an H200 the peaks of updates of Stable
# Diffusion 1.5 and XL lay 65 to 91 MiB above what their tensors take.
LIBRARIES = 96 * 2**20


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
    """

    def __init__(self, iteration: Iteration, ways: list[Way], budget: int, like: Execution) -> None:
        self.iteration, self.ways, self.budget, self.like = iteration, ways, budget, like
        self.plans = sorted(
            (self._plan(way, weights, budget) for weights, way in self._combinations()),
            key=lambda plan: (plan.passes, WEIGHTS.index(plan.weights), plan.bytes),
        )

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
    def fitting(self) -> Plan | None:
        """The fastest within the budget."""
        return next((plan for plan in self.plans if plan.feasible), None)

    @property
    def choice(self) -> Plan:
        found = self.fitting
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
        """The same ways for another budget; nothing is measured again."""
        return Plans(self.iteration, self.ways, budget, self.like)

    def groups(self) -> list[Plan]:
        """For each weights, blocks, guidance and trajectory: the fastest that fits, else the smallest."""
        best: dict[Any, Plan] = {}
        for plan in self.plans:
            key = (plan.weights, plan.blocks, plan.memory.split_guidance, plan.memory.trajectory)
            held = best.get(key)
            if held is None or (not held.feasible and (plan.feasible or plan.bytes < held.bytes)):
                best[key] = plan
        return sorted(best.values(), key=lambda plan: (not plan.feasible, plan.passes, plan.bytes))

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


def plan(
    denoiser: Denoiser,
    steps: int,
    batch: int,
    budget: int | str,
    *,
    cond: Any = None,
    loss: str | DistillationLoss | Loss = "l1",
    loss_chunk: int | None = None,
    dtype: torch.dtype | None = None,
    lean: bool = True,
    blocks: Sequence[str] = BLOCKS,
    weights: Sequence[Weights] = ("resident",),
    like: Execution | None = None,
    tableau: Tableau | None = None,
    evaluation_seconds: float | None = None,
    speed: Speed | None = None,
    beside: Beside | Callable[[int], Beside] | None = None,
    libraries: int | None = None,
    probe: Probe | None = None,
    on_probe: Callable[[str], None] | None = None,
) -> Plans:
    """Ways to run one training iteration of ``steps`` evaluations in ``budget`` bytes, fastest first.

    Nothing of the network is computed: it runs in fake tensors, and may itself be made of them. ``cond``: the condition
    of one sample or more; ``loss``: a name as ``distillation_loss`` takes it, what that returns, or
    ``loss(samples, rows) -> [b]`` as ``loss_backward`` does, run once on zeros; ``loss_chunk``: its samples at a time,
    where it has a name; ``dtype``: of the network's weights and arithmetic, if not their own. ``blocks``: ways that are
    tried, nested where nothing before it fits.
    ``weights``: what may be done with them. ``like``: an execution with what no plan chooses (precision, channels
    last), which plans hand on. ``tableau``: the solver, a GeneralizedSolver of full order unless given.
    ``evaluation_seconds``: measured, of one evaluation of the whole batch. ``beside``: what else an iteration runs,
    such as a discriminator, or what makes it of the bytes that the budget leaves beside the smallest of ``weights`` and
    the inputs, fewer than 0 if it leaves none. ``libraries``: bytes of their workspaces; unless given, LIBRARIES where
    the network is on a CUDA device and none elsewhere. ``probe``: measurements of the same denoiser to go on with.
    ``on_probe`` hears what is measured next.

    Bytes are tensors' and libraries': a CUDA context and the pieces that an allocator cannot use come on top.
    Raises ValueError for numbers below 1, unknown names, a budget without a unit.

        plans = plan(denoiser, steps=10, batch=24, budget="8GiB", cond=labels)
        print(plans.choice)
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"steps and batch must be at least 1, got steps={steps}, batch={batch}")
    for name, given, known in (("blocks", blocks, BLOCKS), ("weights", weights, WEIGHTS)):
        if not given or any(g not in known for g in given):
            raise ValueError(f"{name} must be some of {', '.join(known)}, got {given!r}")
    size = parse_bytes(str(budget)) if not isinstance(budget, int) else budget
    tell = on_probe or (lambda what: None)
    base: Denoiser = denoiser
    guide: Callable[[Denoiser], Denoiser] = _as_it_is
    if isinstance(denoiser, GuidedDenoiser):
        base, scale, null = denoiser.base, denoiser.guidance, denoiser.null
        if isinstance(scale, tuple):  # as many bytes as any scale within
            scale, cond = 2.0, cond and cond["cond"]
        null = tree_map(lambda n: torch.zeros_like(n, device="cpu"), null)
        guide = lambda network: guided(network, scale, null)  # noqa: E731
    if cond is None and base.classes:
        cond = torch.zeros(1, dtype=torch.int64)
    like = like or Execution()
    if like.compile or like.cuda_graphs:
        raise ValueError(
            "a plan counts the bytes of the network as it is, not of what compile or cuda_graphs makes of it; leave "
            "out one or the other"
        )
    if dtype is None and like.precision != "fp32":
        dtype = DTYPES[like.precision]
    if not viewable(base):  # nothing can take the place of its network
        if tuple(weights) != ("resident",):
            raise ValueError(hidden(base))
        lean, blocks = False, ("none",)
    tell("the network in fake tensors")
    probe = probe or Probe(base, cond, dtype)
    tableau = tableau or GeneralizedSolver(steps, base.schedule, base.t_eps).tableau(base.prediction)
    if tableau.steps != steps:
        raise ValueError(f"the tableau has {tableau.steps} steps, not {steps}")
    tell("the loss")
    loss_bytes, held = 0, LIBRARIES if libraries is None and probe.device.type == "cuda" else libraries or 0
    if isinstance(loss, str | DistillationLoss):
        loss, loss_bytes = loss_against_zeros(loss, probe, loss_chunk)
    iteration = Iteration(
        probe, steps, batch, lean, tuple(weights), 1 if guide is _as_it_is else 2, 0, loss_bytes + held,
        speed or Speed(), evaluation_seconds,
    )  # fmt: skip
    if callable(beside):
        beside = beside(size - min(map(iteration.weight_bytes, weights)) - iteration.input_bytes)
    beside = beside or Beside()
    loss = loss if beside.loss is None else _sum(loss, beside.loss)
    (peak_1, loss_flops), (peak_2, _) = (probe.loss_cost(loss, n) for n in (1, 2))
    iteration, ways = replace(iteration, loss_flops=loss_flops, beside=beside), list[Way]()
    for kind in blocks:
        if kind == "nested" and Plans(iteration, ways, size, like).fitting:
            continue  # the slowest, and slow to measure
        if not probe.known(lean, kind):
            tell(f"a call, blocks={kind}")
        try:
            probe.cost(lean, kind, 1), probe.cost(lean, kind, 2)
        except ValueError:  # a network without blocks
            if kind == "none":
                raise
            continue
        for memory in _policies(steps, guide is not _as_it_is):
            peaks = [
                rehearse(probe, tableau, n, memory, lean, kind, loss_peak, guide)
                for n, loss_peak in ((1, peak_1), (2, peak_2))
            ]
            ways.append(Way(memory, kind, 2 if memory.split_guidance else 1, *peaks))
    if all(w == "streamed" for w in weights) and all(way.blocks == "none" for way in ways):
        raise ValueError(f"no block was found in {base.name}, so its weights cannot be streamed")
    return Plans(iteration, ways, size, like)


def _sum(one: Loss, other: Loss) -> Loss:
    return lambda x, rows: one(x, rows) + other(x, rows)


def _as_it_is(denoiser: Denoiser) -> Denoiser:
    return denoiser


def _policies(steps: int, guided: bool) -> Iterable[MemoryPolicy]:
    """Numbers of kept graphs by doubling: what lies between them differs little in time."""
    for split in (False, True) if guided else (False,):
        calls = steps * (1 + split)
        some = [1 << i for i in range(calls.bit_length()) if 1 << i < calls]
        for kept in [*some, 0]:
            yield MemoryPolicy(kept, split_guidance=split)
        alone = MemoryPolicy(1, split_guidance=split, loss_alone=True)
        yield alone
        yield replace(alone, trajectory="offload")
