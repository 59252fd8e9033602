"""The only sampling loop: forward, and its hand-written adjoint beside it.

    x[n+1] = sum_{j<=n} A[n,j] x[j] + B[n,j] F[j],      F[j] = net(c_in[j] x[j], t_net[j])

Backward, for j = K-1 .. 0, with g[n] = dL/dx[n] and all g[n+1], n >= j, known::

    mu[j]   = sum_{n>=j} B[n,j] g[n+1]
    dA[n,j] = <g[n+1], x[j]>,   dB[n,j] = <g[n+1], F[j]>
    g[j]    = sum_{n>=j} A[n,j] g[n+1] + c_in[j] VJP(j, mu[j]),   dc_in[j] = <VJP, x[j]>,   dt_net[j] from the VJP

F[j] is rebuilt by the evaluation that the VJP needs anyway, so the states x[0..K] are all that must survive the
forward pass, and g[j] takes the place of x[j]. Shape legend: K steps, B batch, states [B, ...].
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from ._attention import without_cudnn
from .denoiser import Denoiser, each, weighted_sum
from .memory import MemoryPolicy, phase
from .memory.blocks import changes_in_training
from .memory.offload import Offloaded
from .memory.precision import power_of_two
from .memory.reversal import Reversible
from .memory.trajectory import Coefficients, Kept
from .ops import MAX_STATES
from .tableau import Tableau

OnStep = Callable[[int, Tensor], None]
Trajectory = Kept | Offloaded | Reversible
# Denoisers that were seen to repeat their bits, and for what kind of input.
_REPEATS: weakref.WeakKeyDictionary[nn.Module, set] = weakref.WeakKeyDictionary()


def rollout(
    denoiser: Denoiser,
    x: Tensor,
    tableau: Tableau,
    cond: Any = None,
    memory: MemoryPolicy | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run a solver: noise x [B, *shape] -> x[K] of the same shape, dtype and device, by K network evaluations.

    A tableau that is not folded yet is folded for the denoiser's prediction type. Differentiable once, in x and in
    every number of the tableau (``A, B, t_net, c_in``); ``cond`` and the weights are constants. ``on_step(n, x[n])``
    sees each new state, for progress bars and pictures, and must not change it.

    Memory: without gradients, the states and outputs that later steps still use. With gradients, the states x[0..K]
    and at most k = ``memory.checkpoint_every`` network graphs, for K - k more evaluations in the backward pass; see
    ``MemoryPolicy`` for the other places where states may live.

    A second backward pass through the same result (``retain_graph``) first runs the K evaluations again.

    Raises ValueError for an x that does not fit the denoiser or a reversible policy on another tableau than a band of
    two, RuntimeError for weights or a ``cond`` that want a gradient and for a reversible walk that does not come back.

        tableau = classical.unipc(denoiser.schedule, times)
        images = rollout(denoiser, noise, tableau, cond=labels)
    """
    _check_state(denoiser, x)
    memory = memory or MemoryPolicy()
    if tableau.prediction is not None:
        tableau = tableau.fold(denoiser.prediction)
    assert tableau.c_in is not None
    scaled = tableau.explicit_input_scale
    if torch.is_grad_enabled():
        _check_constants(denoiser, cond)
        if x.requires_grad or tableau.requires_grad:
            if tableau.steps > MAX_STATES:
                raise ValueError(f"gradients go through at most {MAX_STATES} steps, got {tableau.steps}")
            numbers = (tableau.A, tableau.B, tableau.t_net, tableau.c_in)
            return _Rollout.apply(denoiser, cond, memory, on_step, scaled, x, *numbers)
    with torch.no_grad():
        network = _Network(denoiser, cond, tableau.t_net, memory, x.device)
        network.kept = 0
        coefficients = Coefficients(tableau.A, tableau.B, tableau.c_in if scaled else None, x.device, adjoint=False)
        return _forward(network, Kept(coefficients, x, forget=True), tableau.steps, on_step)


@dataclass
class _Graph:
    """One live network graph: leaves, and the output that a VJP starts from."""

    x: Tensor
    t: Tensor
    output: Tensor


class _Network:
    """F[j] as one network call, or as the weighted sum of several: T calls an evaluation, T = 2 for split guidance."""

    def __init__(
        self, denoiser: Denoiser, cond: Any, t_net: Tensor, memory: MemoryPolicy, device: torch.device
    ) -> None:
        terms = denoiser.terms(cond) if memory.split_guidance else []
        self.denoiser = denoiser.base if len(terms) > 1 else denoiser
        self.conds = [c for _, c in terms] if len(terms) > 1 else [cond]
        self.weights = [weight for weight, _ in terms]
        self.t_net = t_net.to(device, non_blocking=True).unbind()
        self.kept = memory.kept(len(t_net) * len(self.conds))
        self.x_wanted = self.t_wanted = False
        self.autocast: torch.dtype | None = None  # of the forward pass, which the backward pass must repeat
        self.narrow = False  # cotangents are small where the loss is a mean, and float16 ends at 6e-8
        self.graphs: dict[tuple[int, int], _Graph] = {}

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        with phase("network"), without_cudnn(x.device):
            if self.autocast is None:
                output = self.denoiser(x, t, cond)
            else:
                with torch.autocast(x.device.type, self.autocast, cache_enabled=False):
                    output = self.denoiser(x, t, cond)
            return output.float() if output.dtype == torch.float16 else output

    def output(self, j: int, x: Tensor) -> Tensor:
        """F[j]; the graphs of the last ``kept`` calls of all stay alive."""
        first_kept = len(self.t_net) * len(self.conds) - self.kept
        outputs = []
        for i, cond in enumerate(self.conds):
            if j * len(self.conds) + i < first_kept:
                outputs.append(self(x, self.t_net[j], cond))
            else:
                self.graphs[j, i] = graph = self.new_graph(j, i, x)
                outputs.append(graph.output.detach())
        return self.sum(outputs)

    def sum(self, outputs: list[Tensor]) -> Tensor:
        return outputs[0] if len(outputs) == 1 else weighted_sum(outputs, self.weights)

    def graph(self, j: int, i: int, x: Tensor) -> _Graph:
        """Call i of evaluation j with a graph: the one that was kept, or a new one."""
        return self.graphs.pop((j, i), None) or self.new_graph(j, i, x)

    def new_graph(self, j: int, i: int, x: Tensor) -> _Graph:
        """Call i of evaluation j, made now."""
        # The first state is noise: nothing but its told time needs a derivative there, unless x itself wants one.
        leaf = x.detach().requires_grad_(j > 0 or self.x_wanted)
        t = self.t_net[j].detach().requires_grad_(self.t_wanted)
        with torch.enable_grad():
            return _Graph(leaf, t, self(leaf, t, self.conds[i]))

    def adjoint(self, j: int, states: Trajectory) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The products of column j, and the VJPs of evaluation j with x and t."""
        x = states.input(j)
        if len(self.conds) == 1:
            graph = self.graph(j, 0, x)
            with phase("states"):
                mu, products = states.adjoint(j, graph.output.detach())
            return products, *self.vjp(graph, mu)
        outputs: list[Tensor] = []
        vjp_x: Tensor | None = None
        vjp_t: Tensor | None = None
        for i in reversed(range(len(self.conds))):
            graph = self.graph(j, i, x)
            outputs.append(graph.output.detach())
            mu = states.mu(j, outputs[-1].dtype)
            by_x, by_t = self.vjp(graph, mu.mul_(each(self.weights[i], mu)))
            del graph, mu
            vjp_x = by_x if vjp_x is None or by_x is None else vjp_x.add_(by_x)
            vjp_t = by_t if vjp_t is None or by_t is None else vjp_t + by_t
        with phase("states"):
            return states.adjoint(j, self.sum(outputs[::-1]))[1], vjp_x, vjp_t

    def vjp(self, graph: _Graph, mu: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The products of mu with the derivatives of F by x and t."""
        wanted = [leaf for leaf in (graph.x, graph.t) if leaf.requires_grad]
        if not wanted or not graph.output.requires_grad:
            return None, None
        scale = power_of_two(mu) if self.narrow else None
        with phase("network"), without_cudnn(mu.device):
            mu = mu if scale is None else mu / scale
            found = torch.autograd.grad(graph.output, wanted, mu, allow_unused=True)
        grads = iter(found if scale is None else [g if g is None else g * scale for g in found])
        return next(grads) if graph.x.requires_grad else None, next(grads) if graph.t.requires_grad else None

    def check_that_it_repeats(self, x: Tensor, output: Tensor) -> None:
        """A reversible trajectory needs the rebuilt F[0] to be F[0] to the bit; asked once per kind of input."""
        key = (x.shape, x.dtype, x.device, self.autocast)
        if key in _REPEATS.setdefault(self.denoiser, set()):
            return
        rebuilt = self.sum([self.new_graph(0, i, x).output.detach() for i in range(len(self.conds))])
        if not torch.equal(rebuilt, output):
            worst = float((rebuilt - output).abs().max())
            raise RuntimeError(
                "trajectory='reversible' needs an evaluation to repeat to the bit, and two calls of it differ by "
                f"up to {worst:.3g}; try torch.use_deterministic_algorithms(True) or torch.backends.cudnn.benchmark = "
                "False, or trajectory='keep'"
            )
        _REPEATS[self.denoiser].add(key)


def _forward(network: _Network, states: Trajectory, steps: int, on_step: OnStep | None, check: bool = False) -> Tensor:
    for n in range(steps):
        with phase("states"):
            shown = states.input(n)
        output = network.output(n, shown)
        if check and n == 0:
            network.check_that_it_repeats(shown, output)
        del shown
        with phase("states"):
            new = states.step(n, output)
        del output
        if on_step is not None:
            on_step(n + 1, new)
        del new
    return states.take(steps)


class _Rollout(torch.autograd.Function):
    """The differentiable rollout. Scalars cross to the device once on the way in and once on the way out."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, denoiser: Denoiser, cond: Any, memory: MemoryPolicy, on_step: OnStep | None, scaled: bool, x: Tensor,
        A: Tensor, B: Tensor, t_net: Tensor, c_in: Tensor,
    ) -> Tensor:  # fmt: skip
        x_wanted, _, _, t_wanted, c_wanted = ctx.needs_input_grad[5:]
        device = x.device
        network = _Network(denoiser, cond, t_net.detach(), memory, device)
        network.x_wanted, network.t_wanted = x_wanted or c_wanted, t_wanted
        if torch.is_autocast_enabled(device.type):
            network.autocast = torch.get_autocast_dtype(device.type)
        weights = denoiser.parameters() if isinstance(denoiser, nn.Module) else ()
        network.narrow = torch.float16 in (network.autocast, *(p.dtype for p in weights))
        a, b, start = A.detach(), B.detach(), x.detach()
        numbers = Coefficients(a, b, c_in.detach() if scaled else None, device, adjoint=True)

        def states() -> Trajectory:
            if memory.trajectory == "reversible":
                return Reversible(numbers, a, b, start, memory.carry, memory.meter)
            return Offloaded(numbers, start) if memory.trajectory == "offload" else Kept(numbers, start)

        ctx.network, ctx.steps, ctx.walk = network, len(A), states()
        result = _forward(network, ctx.walk, len(A), on_step, memory.trajectory == "reversible")
        # Only a trajectory that keeps x[0] anyway can be walked a second time.
        ctx.again = states if memory.trajectory == "keep" else None
        # The trajectories that hold the caller's own x to the end.
        ctx.start = start if memory.trajectory == "keep" or len(A) == 1 else None
        ctx.version = x._version
        ctx.save_for_backward(*([result] if memory.trajectory == "reversible" and not memory.carry else []))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        network, states, steps = ctx.network, ctx.walk, ctx.steps
        result = next(iter(ctx.saved_tensors), None)
        if ctx.start is not None and ctx.start._version != ctx.version:
            raise RuntimeError("the initial state was changed in place between rollout and its backward pass")
        if states is None:
            if ctx.again is None:
                raise RuntimeError(
                    "an offloaded or reversible trajectory can be walked back once; for a second backward pass use "
                    "trajectory='keep', or run the rollout again"
                )
            states = ctx.again()
            _forward(network, states, steps, None)
        ctx.walk = None
        states.turn(grad, result)
        del result
        zero = torch.zeros((), dtype=torch.float64, device=grad.device)
        d_columns: list[Tensor] = []
        d_t, d_c = [zero] * steps, [zero] * steps
        for j in reversed(range(steps)):
            products, vjp_x, vjp_t = network.adjoint(j, states)
            d_columns.append(products)
            if vjp_t is not None:
                d_t[j] = vjp_t
            with phase("states"):
                product = states.settle(j, vjp_x)
            del vjp_x
            if product is not None:
                d_c[j] = product
        scalars = torch.cat([torch.cat(d_columns[::-1], dim=1).flatten(), *(torch.stack(d) for d in (d_t, d_c))]).cpu()
        *halves, d_t, d_c = scalars.split([steps * (steps + 1) // 2] * 2 + [steps] * 2)
        lower = torch.ones(steps, steps, dtype=torch.bool).triu()
        d_a, d_b = (torch.zeros(steps, steps, dtype=torch.float64).masked_scatter(lower, half).T for half in halves)
        return None, None, None, None, None, states.cotangent(), d_a, d_b, d_t, d_c


def _check_state(denoiser: Denoiser, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"the initial state must be floating point, got {x.dtype}")
    shape = getattr(denoiser, "shape", None)
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        needed = ", ".join(map(str, shape))
        raise ValueError(f"the initial state has shape {tuple(x.shape)}, but the model needs [batch, {needed}]")


def _check_constants(denoiser: Denoiser, cond: Any) -> None:
    if isinstance(denoiser, nn.Module) and any(p.requires_grad for p in denoiser.parameters()):
        raise RuntimeError(
            "the network has trainable weights, and rollout gives them no gradient; freeze them with "
            "network.requires_grad_(False), or sample under torch.no_grad()"
        )
    modules = denoiser.modules() if isinstance(denoiser, nn.Module) else ()
    moody = next((m for m in modules if m.training and changes_in_training(m)), None)
    if moody is not None:
        raise RuntimeError(f"{type(moody).__name__} is in train mode, so a rebuilt evaluation differs; call .eval()")
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(cond)):
        raise RuntimeError("cond wants a gradient, and rollout gives it none; pass cond.detach()")
