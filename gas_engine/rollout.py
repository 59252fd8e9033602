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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from .denoiser import Denoiser
from .memory import MemoryPolicy
from .ops import MAX_STATES, adjoint_step, lincomb
from .tableau import Tableau

# Modules whose output in train mode is random, or changes what they do next time.
_MOODY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)

OnStep = Callable[[int, Tensor], None]


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
    and at most k = ``memory.checkpoint_every`` network graphs, for K - k more evaluations in the backward pass.

    A second backward pass through the same result (``retain_graph``) first runs the K evaluations again.

    Raises ValueError for an x that does not fit the denoiser, RuntimeError for weights or a ``cond`` that want a
    gradient.

        tableau = classical.unipc(denoiser.schedule, times)
        images = rollout(denoiser, noise, tableau, cond=labels)
    """
    _check_state(denoiser, x)
    if tableau.prediction is not None:
        tableau = tableau.fold(denoiser.prediction)
    assert tableau.c_in is not None
    scaled = tableau.explicit_input_scale
    if torch.is_grad_enabled():
        _check_constants(denoiser, cond)
        if x.requires_grad or tableau.requires_grad:
            if tableau.steps > MAX_STATES:
                raise ValueError(f"gradients go through at most {MAX_STATES} steps, got {tableau.steps}")
            kept = (memory or MemoryPolicy()).kept(tableau.steps)
            numbers = (tableau.A, tableau.B, tableau.t_net, tableau.c_in)
            return _Rollout.apply(denoiser, cond, kept, on_step, scaled, x, *numbers)
    with torch.no_grad():
        network = _Network(
            denoiser, cond, tableau.t_net.to(x.device).unbind(), tableau.c_in.to(x.device) if scaled else None
        )
        return _forward(network, tableau.A, tableau.B, x, 0, on_step, keep_states=False)[0][tableau.steps]


@dataclass
class _Graph:
    """One live network graph: leaves, and the output that a VJP starts from."""

    x: Tensor
    t: Tensor
    output: Tensor


@dataclass
class _Network:
    """The denoiser with its told times [K] and input scales [K] or None, on the states' device."""

    denoiser: Denoiser
    cond: Any
    t_net: tuple[Tensor, ...]
    c_in: Tensor | None
    x_wanted: bool = False
    t_wanted: bool = False
    autocast: torch.dtype | None = None  # of the forward pass, which the backward pass must repeat

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.autocast is None:
            return self.denoiser(x, t, self.cond)
        with torch.autocast(x.device.type, self.autocast, cache_enabled=False):
            return self.denoiser(x, t, self.cond)

    def output(self, j: int, x: Tensor) -> Tensor:
        return self(x, self.t_net[j])

    def graph(self, j: int, x: Tensor) -> _Graph:
        # The first state is noise: nothing but its told time needs a derivative there, unless x itself wants one.
        leaf = x.detach().requires_grad_(j > 0 or self.x_wanted)
        t = self.t_net[j].detach().requires_grad_(self.t_wanted)
        with torch.enable_grad():
            return _Graph(leaf, t, self(leaf, t))

    def input(self, j: int, x: Tensor) -> Tensor:
        if self.c_in is None:
            return x
        # The op that scales new states, so that a rebuilt input has the very same bits.
        one = torch.ones(1, dtype=torch.float64, device=x.device)
        return lincomb([x], one, scale=self.c_in[j : j + 1], cast=x.dtype)[1]


def _forward(
    network: _Network, A: Tensor, B: Tensor, x: Tensor, kept: int, on_step: OnStep | None, keep_states: bool
) -> tuple[dict[int, Tensor], dict[int, _Graph]]:
    """The states (all of them, or those still needed) and the graphs of the last ``kept`` evaluations."""
    steps = len(A)
    # An exact zero needs neither a read nor a slot. All the others cross to the device at once.
    both = torch.cat([A, B], dim=1)
    used = [[j for j, value in enumerate(row) if value != 0.0] for row in both.tolist()]
    coefficients = both[both != 0].to(x.device).split([len(columns) for columns in used])
    state_terms = [[j for j in columns if j < steps] for columns in used]
    output_terms = [[j - steps for j in columns if j >= steps] for columns in used]
    last_state, last_output = _last_use(state_terms), _last_use(output_terms)

    states, outputs, graphs = {0: x.detach()}, {}, {}
    shown = network.input(0, states[0])
    for n in range(steps):
        if n < steps - kept:
            output = network.output(n, shown)
        else:
            graphs[n] = network.graph(n, shown)
            output = graphs[n].output.detach()
        # A network in another precision hands its output over in its own dtype; states keep theirs.
        outputs[n] = output.to(x.dtype)
        terms = [*(states[j] for j in state_terms[n]), *(outputs[j] for j in output_terms[n])]
        if network.c_in is None or n + 1 == steps:
            states[n + 1] = shown = lincomb(terms, coefficients[n])
        else:
            scale = network.c_in[n + 1 : n + 2]
            states[n + 1], shown = lincomb(terms, coefficients[n], scale=scale, cast=x.dtype)
        for j in last_output[n]:
            del outputs[j]
        if not keep_states:
            for j in last_state[n]:
                del states[j]
        if on_step is not None:
            on_step(n + 1, states[n + 1])
    return states, graphs


class _Rollout(torch.autograd.Function):
    """The differentiable rollout. Scalars cross to the device once on the way in and once on the way out."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, denoiser: Denoiser, cond: Any, kept: int, on_step: OnStep | None, scaled: bool, x: Tensor,
        A: Tensor, B: Tensor, t_net: Tensor, c_in: Tensor,
    ) -> Tensor:  # fmt: skip
        x_wanted, _, _, t_wanted, c_wanted = ctx.needs_input_grad[5:]
        device = x.device
        network = _Network(
            denoiser, cond, t_net.detach().to(device).unbind(), c_in.detach().to(device) if scaled else None,
            x_wanted or c_wanted, t_wanted,
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None,
        )  # fmt: skip
        states, graphs = _forward(network, A.detach(), B.detach(), x, kept, on_step, keep_states=True)
        result = states.pop(len(A))
        ctx.network, ctx.states, ctx.graphs = network, states, graphs
        ctx.version = x._version
        ctx.again = (A.detach(), B.detach(), x.detach(), kept, None, True)
        # Columns of A and B from the diagonal down, as the adjoint reads them.
        lower = torch.ones_like(A, dtype=torch.bool).triu()
        columns = torch.stack([A.detach().T[lower], B.detach().T[lower]]).to(device)
        ctx.columns = [pair.unbind() for pair in columns.split(list(range(len(A), 0, -1)), dim=1)]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        network, slots, graphs = ctx.network, ctx.states, ctx.graphs
        if slots is None:
            slots, graphs = _forward(network, *ctx.again)
        ctx.states = ctx.graphs = None
        if slots[0]._version != ctx.version:
            raise RuntimeError("the initial state was changed in place between rollout and its backward pass")
        steps = len(ctx.columns)
        # From here on slot n holds g[n] instead of x[n], for every n that the loop has passed.
        slots[steps] = grad.contiguous()
        zero = torch.zeros((), dtype=torch.float64, device=grad.device)
        d_columns: list[Tensor] = []
        d_t, d_c = [zero] * steps, [zero] * steps
        for j in reversed(range(steps)):
            graph = graphs.pop(j, None) or network.graph(j, network.input(j, slots[j]))
            output = graph.output.detach()  # in the network's own dtype, and so is mu
            later = [slots[n] for n in range(j + 1, steps + 1)]
            mu, partial, *products = adjoint_step(slots[j], output, later, *ctx.columns[j])
            d_columns.append(torch.stack(products))
            vjp_x, vjp_t = _vjp(graph, mu)
            del graph, output, mu
            if vjp_t is not None:
                d_t[j] = vjp_t
            if vjp_x is not None:
                if network.c_in is None:
                    partial += vjp_x
                else:
                    d_c[j] = torch.dot(vjp_x.flatten().double(), slots[j].flatten().double())
                    partial.addcmul_(vjp_x, network.c_in[j].to(vjp_x.dtype))
            slots[j] = partial
        scalars = torch.cat([torch.cat(d_columns[::-1], dim=1).flatten(), *(torch.stack(d) for d in (d_t, d_c))]).cpu()
        *halves, d_t, d_c = scalars.split([steps * (steps + 1) // 2] * 2 + [steps] * 2)
        lower = torch.ones(steps, steps, dtype=torch.bool).triu()
        d_a, d_b = (torch.zeros(steps, steps, dtype=torch.float64).masked_scatter(lower, half).T for half in halves)
        return None, None, None, None, None, slots[0], d_a, d_b, d_t, d_c


def _vjp(graph: _Graph, mu: Tensor) -> tuple[Tensor | None, Tensor | None]:
    wanted = [leaf for leaf in (graph.x, graph.t) if leaf.requires_grad]
    if not wanted or not graph.output.requires_grad:
        return None, None
    grads = iter(torch.autograd.grad(graph.output, wanted, mu, allow_unused=True))
    return next(grads) if graph.x.requires_grad else None, next(grads) if graph.t.requires_grad else None


def _last_use(terms: list[list[int]]) -> list[list[int]]:
    """For each step, the columns that no later step reads; one that is never read goes at its own step."""
    last = {j: j for j in range(len(terms))}
    for n, columns in enumerate(terms):
        last.update((j, n) for j in columns)
    return [[j for j, step in last.items() if step == n] for n in range(len(terms))]


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
    moody = next((m for m in modules if m.training and (isinstance(m, _MOODY) or getattr(m, "dropout", False))), None)
    if moody is not None:
        raise RuntimeError(f"{type(moody).__name__} is in train mode, so a rebuilt evaluation differs; call .eval()")
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(cond)):
        raise RuntimeError("cond wants a gradient, and rollout gives it none; pass cond.detach()")
