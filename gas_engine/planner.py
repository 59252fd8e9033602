"""From a budget in bytes to a way of running one training iteration: what is kept, rebuilt, offloaded, split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
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
from .plans import Plan, Plans
from .rehearsal import rehearse
from .solvers import GeneralizedSolver
from .tableau import Tableau
from .units import parse_bytes

__all__ = ["LIBRARIES", "Plan", "Plans", "plan"]

# Workspaces of cuBLAS, two handles of 32 MiB on Hopper, and of cuDNN: on an H200 the peaks of updates of Stable
# Diffusion 1.5 and XL lay 65 to 91 MiB above what their tensors take.
LIBRARIES = 96 * 2**20


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
    iteration = replace(iteration, loss_flops=loss_flops, beside=beside)

    @cache
    def measured(kind: str) -> list[Way]:
        if not probe.known(lean, kind):
            tell(f"a call, blocks={kind}")
        try:
            probe.cost(lean, kind, 1), probe.cost(lean, kind, 2)
        except ValueError:  # a network without blocks
            if kind == "none":
                raise
            return []
        return [
            Way(
                memory, kind, 2 if memory.split_guidance else 1,
                rehearse(probe, tableau, 1, memory, lean, kind, peak_1, guide),
                rehearse(probe, tableau, 2, memory, lean, kind, peak_2, guide),
            )
            for memory in _policies(steps, guide is not _as_it_is)
        ]  # fmt: skip

    later = "nested" in blocks and len(blocks) > 1  # slow to run, and to measure
    ways = [way for kind in blocks if kind != "nested" or not later for way in measured(kind)]
    if all(w == "streamed" for w in weights) and all(way.blocks == "none" for way in ways):
        raise ValueError(f"no block was found in {base.name}, so its weights cannot be streamed")
    return Plans(iteration, ways, size, like, partial(measured, "nested") if later else list)


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
