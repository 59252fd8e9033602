"""What a training iteration costs outside the network, against a sampling loop of plain autograd.

The plain loop is what one writes first: every coefficient a Python-indexed scalar tensor, one history list, autograd
through all of it. Both run the same solver on a network that does almost nothing, and both include the tableau.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, Schedule, rollout

VP = Schedule.vp_linear(0.1, 20.0)


def network(x: Tensor, t: Tensor, cond: object = None) -> Tensor:
    return x * t.to(x.dtype)


def plain_iteration(solver: GeneralizedSolver, x: Tensor) -> Tensor:
    """The Generalized Solver step by step with scalar tensors, as the equations are written (orders 1, 2, >= 3)."""
    times = solver.times()
    told = times[:-1] + solver.xi
    lam = [VP.lam(t) for t in times]
    alphas, sigmas = [VP.alpha(t) for t in times], [VP.sigma(t) for t in times]
    states, estimates = [x], []
    for n in range(solver.steps):
        state = states[n]
        output = network(state, told[n])
        told_alpha, told_sigma = VP.alpha(told[n]), VP.sigma(told[n])
        noise = (state - told_alpha.to(x.dtype) * output) / told_sigma.to(x.dtype)
        estimates.append((state - sigmas[n].to(x.dtype) * noise) / alphas[n].to(x.dtype))
        h = lam[n + 1] - lam[n]
        phi1 = torch.expm1(-h)
        phi2 = phi1 / h + 1
        phi3 = phi2 / h - 0.5
        a, c = solver.phi_a[n], solver.phi_c[n]
        m = estimates[::-1]
        new = (sigmas[n + 1] / sigmas[n] + a[0]).to(x.dtype) * state
        new = new - (alphas[n + 1] * phi1 + c[0]).to(x.dtype) * m[0]
        if n == 1:
            r0 = (lam[n] - lam[n - 1]) / h
            d10 = (m[0] - m[1]) / r0.to(x.dtype)
            new = new - (alphas[n + 1] * phi1 / 2 + c[1]).to(x.dtype) * d10 + a[1].to(x.dtype) * states[0]
        elif n >= 2:
            r0, r1 = (lam[n] - lam[n - 1]) / h, (lam[n - 1] - lam[n - 2]) / h
            d10, d11 = (m[0] - m[1]) / r0.to(x.dtype), (m[1] - m[2]) / r1.to(x.dtype)
            d1 = d10 + (r0 / (r0 + r1)).to(x.dtype) * (d10 - d11)
            d2 = (d10 - d11) / (r0 + r1).to(x.dtype)
            new = new + (alphas[n + 1] * phi2 + c[1]).to(x.dtype) * d1
            new = new - (alphas[n + 1] * phi3 + c[2]).to(x.dtype) * d2
            for lag in range(1, n + 1):
                new = new + a[lag].to(x.dtype) * states[n - lag]
                if lag >= 3:
                    new = new + c[lag].to(x.dtype) * m[lag]
        states.append(new)
    return states[-1]


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("shape", [(24, 3, 32, 32), (4, 4, 64, 64)], ids=["24x3x32x32", "4x4x64x64"])
def bench_iteration_outside_the_network(
    compare: Callable[..., dict[str, float]],
    bench_record: Callable[..., None],
    smoke: bool,
    steps: int,
    shape: tuple[int, ...],
) -> None:
    shape = (2, 1, 4, 4) if smoke else shape
    denoiser = Denoiser(network, VP, "data", shape[1:])
    solver = GeneralizedSolver(steps, VP)
    x, target = torch.randn(shape), torch.zeros(shape)

    def engine() -> None:
        out = rollout(denoiser, x, solver.tableau("data"), memory=MemoryPolicy(1))
        solver.zero_grad()
        (out - target).abs().mean().backward()

    def plain() -> None:
        out = plain_iteration(solver, x)
        solver.zero_grad()
        (out - target).abs().mean().backward()

    with torch.no_grad():
        mine, theirs = rollout(denoiser, x, solver.tableau("data")), plain_iteration(solver, x)
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4), "both must compute the same thing"

    def network_calls(forward: int, with_graph: int) -> None:
        """The evaluations themselves, which an iteration makes with or without any solver around them."""
        told = torch.tensor(0.5, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(forward):
                network(x, told)
        for _ in range(with_graph):
            leaves = x.detach().requires_grad_(), told.clone().requires_grad_()
            torch.autograd.grad(network(*leaves), leaves, x)

    callables = {
        "engine": engine,
        "plain autograd, scalar tensors": plain,
        "network calls of the engine": lambda: network_calls(steps - 1, steps),
        "network calls of the plain loop": lambda: network_calls(0, steps),
    }
    size = "x".join(map(str, shape))
    seconds = compare("iteration", callables, 60, "cpu", steps=steps, size=size)
    mine, theirs, my_network, their_network = seconds.values()
    ratio = float(f"{(theirs - their_network) / (mine - my_network):.3g}")
    bench_record("iteration", "cpu", steps=steps, size=size, name="outside the network: plain / engine", ratio=ratio)
