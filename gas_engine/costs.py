"""What one network call and one loss cost, from fake tensors: no weights, no device, no arithmetic.

A call's bytes are affine in its batch: what scales with the samples, and a little that does not. Two runs at batches 1
and 2 tell all of it. What else lives in a training iteration, ``rehearsal`` counts where it happens.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import conv_flop_count, flop_registry

from .conditioning import Conditioning
from .denoiser import Denoiser
from .execution import Execution, viewable
from .losses.distillation import DistillationLoss, distillation_loss
from .memory import ByteTracker, cast, phase, quantisable
from .memory.blocks import repeated_blocks
from .schedule import Schedule

Loss = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class CallCost:
    """One network call at one batch, in bytes beyond its input and the weights, and floating point operations.

    ``output``: of F. ``plain_peak``: at most alive in a call without gradients. ``kept``: alive after a call with
    gradients (F included), ``forward_peak`` at most during it. ``backward_peak``: at most in its backward pass, with
    all that was kept, beyond the cotangent of F; ``inner_peak`` if that cotangent dies with its first use, as it does
    inside of a larger graph. ``operations``: how many run in a plain call, and in a backward pass.
    ``keeps_input``: whether the graph holds the input too.
    """

    output: int
    plain_peak: int
    kept: int
    forward_peak: int
    backward_peak: int
    inner_peak: int
    forward_flops: int
    backward_flops: int
    operations: int
    backward_operations: int
    keeps_input: bool
    dtype: torch.dtype

    def to(self, other: CallCost, batch: int) -> CallCost:
        """Of another batch, where this one is of batch 1 and ``other`` of batch 2."""
        numbers = {
            f.name: getattr(self, f.name) + (batch - 1) * (getattr(other, f.name) - getattr(self, f.name))
            for f in fields(self)
            if f.type == "int"
        }
        return replace(self, **numbers)


class Probe:
    """A denoiser in fake tensors, and what its calls cost; each is measured once.

    ``dtype``: of its weights and arithmetic, if not their own. The denoiser is left as it is. ``cond``: its condition
    for one sample or more. Modules that a plain function closes over are found; lean and block views need a function
    that is a module. One that is built under FakeTensorMode must allow inputs that are not fake.
    """

    def __init__(self, denoiser: Denoiser, cond: Any = None, dtype: torch.dtype | None = None) -> None:
        tensors = [*denoiser.parameters(), *denoiser.buffers()]
        modes = (t.fake_mode for t in tensors if isinstance(t, FakeTensor))
        self.mode = next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True)
        if denoiser.shape is None:
            raise ValueError(f"{denoiser.name} does not say the shape of its states; give shape= to plan its memory")
        self.shape, self.cond = denoiser.shape, cond
        with self.mode:
            self.denoiser = _in_fake_tensors(denoiser, tensors, None if viewable(denoiser) else dtype)
            if dtype is not None and viewable(denoiser):
                self.denoiser = cast(self.denoiser, dtype)  # type: ignore[assignment]
        self.device = next((t.device for t in tensors if not isinstance(t, FakeTensor)), torch.device("cpu"))
        sizes = {id(p): p.nbytes for p in (*self.denoiser.parameters(), *self.denoiser.buffers())}
        self.weights = sum(sizes.values())
        blocks = repeated_blocks(self.denoiser)
        self.blocks = sorted(sum(p.nbytes for p in (*b.parameters(), *b.buffers())) for b in blocks)
        linear = [layer.weight for layer in quantisable(self.denoiser)]
        self.layers = [w.nbytes for w in linear]
        matrices = {id(p): p for p in linear}.values()
        self.matrix_numbers, self.matrix_bytes = sum(p.numel() for p in matrices), sum(p.nbytes for p in matrices)
        self.matrix_rows = sum(len(p) for p in matrices)
        self._views: dict[tuple[bool, str], Denoiser] = {}
        self._costs: dict[tuple[bool, str, int], CallCost] = {}

    def cond_of(self, batch: int) -> Any:
        """The condition of a batch, in real tensors; of the values, only their kind matters."""
        return tree_map(lambda c: _rows(c, batch) if isinstance(c, Tensor) else c, self.cond)

    def view(self, lean_ops: bool, blocks: str) -> Denoiser:
        if (lean_ops, blocks) not in self._views:
            self._views[lean_ops, blocks] = Execution(lean=lean_ops, blocks=blocks).view(self.denoiser)
        return self._views[lean_ops, blocks]

    def known(self, lean_ops: bool, blocks: str) -> bool:
        """Whether this view has been measured."""
        return (lean_ops, blocks, 2) in self._costs

    def cost(self, lean_ops: bool, blocks: str, batch: int) -> CallCost:
        """One call of a view. Raises ValueError where the network has no blocks."""
        key = (lean_ops, blocks, batch)
        if key not in self._costs and batch in (1, 2):
            # Without gradients, blocks run as they are.
            plain = self.cost(lean_ops, "none", batch) if blocks != "none" else None
            with self.mode:
                x, cond = torch.empty(batch, *self.shape), tree_map(_fake, self.cond_of(batch))
                self._costs[key] = _measure(self.view(lean_ops, blocks), x, cond, plain)
        elif key not in self._costs:
            self._costs[key] = self.cost(lean_ops, blocks, 1).to(self.cost(lean_ops, blocks, 2), batch)
        return self._costs[key]

    def loss_cost(self, loss: Loss, batch: int) -> tuple[int, int]:
        """Bytes at most alive while the loss of a batch and its gradient are made, which they are, once; and FLOPs."""
        x = torch.zeros(batch, *self.shape, device=self.device, requires_grad=True)
        with Work() as work, ByteTracker() as bytes:
            torch.autograd.grad(loss(x, slice(0, batch)).sum() / batch, x)
        return bytes.peak, work.flops


def _in_fake_tensors(denoiser: Denoiser, tensors: list[Tensor], dtype: torch.dtype | None) -> Denoiser:
    memo = _fakes(tensors, dtype)
    for module in denoiser.modules():
        # A decoder, within its tuple, is nothing of the network's.
        memo |= {id(v): v for v in vars(module).values() if isinstance(v, Schedule | Conditioning | tuple)}
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        if inspect.isfunction(denoiser.function) and denoiser.function.__closure__:
            f = denoiser.function
            cells = tuple(types.CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in f.__closure__ or ())
            memo[id(f)] = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, cells)
        return copy.deepcopy(denoiser, memo)


def _fakes(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> dict[int, Any]:
    """For a deep copy, which takes what it finds here for already copied: fake tensors for real ones."""

    def fake(t: Tensor) -> Tensor:
        kind = dtype if dtype is not None and t.is_floating_point() else t.dtype
        empty = torch.empty_strided(t.shape, t.stride(), dtype=kind)
        return nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty

    return {id(t): fake(t) for t in tensors}


def step_cost(network: nn.Module, step: Callable[[nn.Module], Any]) -> tuple[int, int]:
    """Bytes at most alive in ``step(network)``, beyond what it gets, and FLOPs; the network is a copy in fake tensors
    whose weights are to be trained, and within the step all tensors are fake."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        memo = _fakes([*network.parameters(), *network.buffers()])
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            fake = copy.deepcopy(network, memo).requires_grad_(True)
        with Work() as work, ByteTracker() as bytes:
            step(fake)
    return bytes.peak, work.flops


def _rows(c: Tensor, batch: int) -> Tensor:
    return c.detach()[:1].cpu().expand(batch, *c.shape[1:]).contiguous() if c.ndim else c


def _fake(leaf: Any) -> Any:
    return torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf


def _conv_flops(x: Any, weight: Any, bias: Any, *geometry: Any, out_val: Any, **_: Any) -> int:
    return conv_flop_count(x.shape, weight.shape, out_val.shape, transposed=geometry[3])


def _conv_backward_flops(g: Any, weight: Any, size: Any, channels_last: Any, *geometry: Any, **_: Any) -> int:
    return conv_flop_count(size, weight.shape, g.shape, transposed=geometry[3])


_FLOPS = {
    **flop_registry,
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    torch.ops.gas_engine.conv_frozen: _conv_flops,
    torch.ops.gas_engine.conv_frozen_backward: _conv_backward_flops,
}


class Work(TorchDispatchMode):
    """Operations that launch something, and floating point operations; nothing is held, and no module is hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operations += not func.is_view and func.namespace != "prim"
        if func._overloadpacket in _FLOPS:
            self.flops += _FLOPS[func._overloadpacket](*args, **kwargs, out_val=result)
        return result


def _measure(denoiser: Denoiser, x: Tensor, cond: Any, plain: CallCost | None = None) -> CallCost:
    """``plain``: a cost whose call without gradients is the same."""
    t = torch.full((), 0.5, dtype=torch.float64)
    if plain is None:
        with torch.no_grad(), Work() as forward, ByteTracker() as bytes:
            size = denoiser(x, t, cond).untyped_storage().nbytes()
        numbers = size, bytes.peak, forward.flops, forward.operations
    else:
        numbers = plain.output, plain.plain_peak, plain.forward_flops, plain.operations
    size, plain_peak, flops, operations = numbers
    leaves = [x.clone().requires_grad_(), t.clone().requires_grad_()]
    early = [0]  # the peak while the cotangent is alive
    gone: list[bool] = []
    with ByteTracker() as bytes:
        with phase("host"):
            shown = leaves[0].clone()
        weakref.finalize(shown.untyped_storage(), gone.append, True)
        output = denoiser(shown, leaves[1], cond)
        del shown
        keeps_input = not gone
        kept, forward_peak = bytes.live, bytes.peak
        end = _Cotangent.apply(output, lambda: [early.append(bytes.peak), bytes.reset_peak()])  # type: ignore[func-returns-value]
        bytes.reset_peak()
        with Work() as backward:
            torch.autograd.grad(end, leaves, allow_unused=True)
        late = bytes.peak
    return CallCost(
        size, plain_peak, kept, forward_peak, max(*early, late), max(*early, late - output.nbytes), flops,
        backward.flops, operations, backward.operations, keeps_input, output.dtype,
    )  # fmt: skip


class _Cotangent(torch.autograd.Function):
    """Begins a backward pass with a cotangent that nobody counts, and says when it dies."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, died: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        ctx.like, ctx.died = (output.shape, output.dtype), died
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shape, dtype = ctx.like
        with phase("host"):
            mu = torch.zeros(shape, dtype=dtype)
        weakref.finalize(mu.untyped_storage(), ctx.died)
        return mu, None


def loss_against_zeros(loss: str | DistillationLoss, probe: Probe, chunk: int | None = None) -> tuple[Loss, int]:
    """A loss, or that of a name, against zeros, and the bytes of its own weights; LPIPS without its trained weights."""
    distance = distillation_loss(loss, probe.device, chunk=chunk, trained=False) if isinstance(loss, str) else loss
    target = torch.zeros(2, *probe.shape, device=probe.device)
    return (lambda x, rows: distance(x, target[rows])), distance.weight_bytes
