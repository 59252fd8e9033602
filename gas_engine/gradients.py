"""One training gradient: rollout, loss, and back, by micro-batches, with never two large graphs at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .conditioning import take
from .denoiser import Denoiser
from .memory import MemoryPolicy, phase
from .rollout import rollout
from .tableau import Tableau

Numbers = ("A", "B", "t_net", "c_in")


def loss_backward(
    denoiser: Denoiser,
    x: Tensor,
    tableau: Tableau,
    loss: Callable[[Tensor, slice], Tensor],
    cond: Any = None,
    memory: MemoryPolicy | None = None,
    micro_batch: int | None = None,
) -> Tensor:
    """Losses of the samples, [B], after the gradient of their mean went into whatever the tableau was made from.

    ``loss(samples, rows) -> [b]``: one value for each of the samples [b, *shape], which end the noises ``x[rows]``;
    its graph is freed before the sampler's backward pass begins. ``micro_batch`` samples at a time, all unless given:
    exact, since the loss is a mean over samples (sums over the batch change their order, no more). x and cond, a
    tensor or dicts and lists of tensors [B, ...] or [1, ...], are constants.

    Memory: that of one ``rollout`` and its gradient at the size of a micro-batch.
    Raises ValueError for a micro-batch below 1 or a condition of another batch, and what ``rollout`` raises.

        losses = loss_backward(denoiser, noise, solver.tableau("data"), lambda y, rows: distance(y, target[rows]))
        optimizer.step()
    """
    batch = len(x)
    size = batch if micro_batch is None else micro_batch
    if batch == 0 or size < 1:
        raise ValueError(f"batch and micro_batch must be at least 1, got {batch} and {micro_batch}")
    tableau = tableau if tableau.prediction is None else tableau.fold(denoiser.prediction)
    # The solver's own graph is walked once, with what all micro-batches gave to the tableau.
    wanted = [name for name in Numbers if getattr(tableau, name).requires_grad]
    leaves = {name: getattr(tableau, name).detach().requires_grad_() for name in wanted}
    inner = replace(tableau, **leaves)
    losses = []
    for start in range(0, batch, size):
        rows = slice(start, min(start + size, batch))
        samples = rollout(denoiser, x[rows], inner, take(cond, rows, batch), memory)
        end = samples.detach().requires_grad_()
        with phase("loss"):
            values = loss(end, rows)
            (grad,) = torch.autograd.grad(values.sum() / batch, end)
        losses.append(values.detach())
        del values, end
        samples.backward(grad)
        del samples, grad
    torch.autograd.backward([getattr(tableau, name) for name in wanted], [leaves[name].grad for name in wanted])
    return torch.cat(losses)
