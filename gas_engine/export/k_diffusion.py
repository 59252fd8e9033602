"""Learned few-step solvers as a sampler of k-diffusion. This file needs torch, nothing else.

Shape legend: K steps; a denoiser takes states y [B, ...] and their noise level sigma [B], and returns data estimates.
"""

import json
import math
from pathlib import Path

import torch

# A program that begins within 5 % of a solver's first level means that level.
AT_THE_START = 0.95


@torch.no_grad()
def sample_gas(model, x, sigmas, extra_args=None, callback=None, disable=None, *, solver):
    """The Generalized Solver (arXiv 2510.17699) for ``model(x, sigma * s_in, **extra_args) -> denoised``.

    ``solver``: what ``gas_engine.export.for_sigma_space`` makes of solvers of one K or several, or a JSON file of it.
    ``sigmas`` gives K, one less than its length, and where to begin; the solver brings its own levels::

        y[n+1] = sum_j A[n,j] y[j] + B[n,j] D[j],      D[j] = model(scale[j] y[j], told[j])

    Where ``sigmas`` begins below the solver's first level (img2img) its history is missing: DPM-Solver++(2M) leads from
    that very level over the solver's later ones, in K or fewer evaluations. ``x`` [B, ...] is noise, or a noised
    sample, at sigmas[0] in the model's scaling; the result is y[K], in x's dtype; sums are in float32 at least.
    ``callback`` gets x, i, sigma, sigma_hat and denoised; ``disable`` is a progress bar's, and there is none.
    Memory: up to 2K states. Raises ValueError for a K without a solver, with the K that there are.

        sampler = functools.partial(sample_gas, solver="gas_solver.json")
        x0 = sampler(CompVisDenoiser(model), noise * sigmas[0], sigmas, extra_args={"cond": c})
    """
    numbers = read(solver)
    steps, first = len(sigmas) - 1, float(sigmas[0])
    if steps < 1 or first <= 0:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    ones = torch.ones(len(x), dtype=wide, device=x.device)

    def denoise(i, y, level, scale=1.0):
        sigma = level * ones
        denoised = model((y * scale).to(x.dtype), sigma, **(extra_args or {}))
        if callback is not None:
            shown = {"x": y.to(x.dtype), "i": i, "sigma": sigma[0], "sigma_hat": sigma[0], "denoised": denoised}
            callback(shown)
        return denoised.to(wide)

    highest = max(solver["sigmas"][0] for solver in numbers["solvers"].values())
    if first < AT_THE_START * highest:
        return theory(denoise, x.to(wide), later_levels(numbers, first, steps), numbers["kind"]).to(x.dtype)
    if str(steps) not in numbers["solvers"]:
        known = ", ".join(numbers["solvers"])
        raise ValueError(f"there is no learned solver of {steps} steps; the number of steps must be one of {known}")
    return learned(denoise, x.to(wide), numbers["solvers"][str(steps)]).to(x.dtype)


def learned(denoise, y, solver):
    """All steps of a learned solver."""
    states, outputs = [y], []
    for n, (a, b) in enumerate(zip(solver["A"], solver["B"])):  # noqa: B905 (equal lengths)
        outputs.append(denoise(n, states[n], solver["told"][n], solver["scale"][n]))
        new = torch.zeros_like(y)
        for weight, term in zip([*a, *b], [*states, *outputs]):  # noqa: B905
            new = new.add(term, alpha=weight) if weight else new
        states.append(new)
    return states[-1]


def theory(denoise, y, levels, kind):
    """DPM-Solver++(2M) (arXiv 2211.01095) over the given levels, Euler's step first and last."""
    # lambda is -log sigma where the signal has weight 1, and log((1 - sigma) / sigma) of a flow.
    lam = [-math.log(s) + (math.log1p(-s) if kind == "flow" else 0.0) for s in levels]
    old = None
    for i in range(len(levels) - 1):
        new = guess = denoise(i, y, levels[i])
        if old is not None and i < len(levels) - 2:
            guess = new + (new - old) * ((lam[i + 1] - lam[i]) / (2 * (lam[i] - lam[i - 1])))
        ratio = levels[i + 1] / levels[i]
        y, old = ratio * y + (1 - ratio) * guess, new
    return y


def later_levels(numbers, first, steps):
    """The level to begin with and those of a solver after the node nearest to it, of the solver with about as many."""

    def after(solver):
        nodes = solver["sigmas"]
        nearest = min(range(len(nodes)), key=lambda n: abs(math.log(nodes[n] / first)))
        return [first, *(level for level in nodes[nearest + 1 :] if level < first)]

    return min(map(after, numbers["solvers"].values()), key=lambda levels: abs(len(levels) - 1 - steps))


def read(solver):
    """The numbers of learned solvers, from a JSON file or as they are. Raises ValueError for anything else."""
    if not isinstance(solver, dict):
        solver = json.loads(Path(solver).read_text())
    if not isinstance(solver, dict) or "kind" not in solver or not solver.get("solvers"):
        raise ValueError("these are no numbers of learned solvers; gas_engine.export.for_sigma_space makes them")
    return solver
