"""SOAP: Adam in the eigenbasis of the gradients' covariance, whole, because a solver has a few hundred parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SOAP(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) run in the eigenbasis of an average of g g^T (SOAP, arXiv 2409.11321).

        G <- c G + (1 - c) g g^T,  Q = eigenvectors of G,  m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) (Q^T g)^2
        p <- p - rate Q (Q^T m_hat / (sqrt(v_hat) + eps))

    A solver's coefficients are strongly correlated (each is a weight of the same few states), which Adam, seeing one
    coordinate at a time, crosses slowly. All n parameters together form one vector, so the covariance is n x n in
    float64: 12 kB for K = 4, 380 kB for K = 10; its eigenvectors are renewed every max(5, n / 20) steps. For larger
    problems use Adam. Parameters without a gradient wait; sets that take turns must share none, and each has a
    covariance and moments of its own. So has each ``turn`` (an option of the group) of losses that take turns on the
    same parameters, ``turns`` of them. Where all gradients of a turn lie in a subspace, an orthonormal basis of it, the
    group's ``span`` [n, k], makes its covariance k x k, with the same steps.

        optimizer = SOAP(solver.parameters(), lr=1e-2)
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.95), covariance: float = 0.95,
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        options = {"lr": lr, "betas": betas, "covariance": covariance, "eps": eps, "turn": 0, "turns": 1}
        super().__init__(params, options | {"span": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None and len(self.param_groups) == 1
        group = self.param_groups[0]
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        gradient = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        span = group["span"]
        gradient = gradient if span is None else span.T @ gradient
        every, mark = self.state[params[0]], f"{group['turn']}." if group["turns"] > 1 else ""
        state = {name.removeprefix(mark): value for name, value in every.items() if name.startswith(mark)}
        if not state:
            zeros = torch.zeros_like(gradient)
            square = torch.zeros(len(gradient), len(gradient), dtype=gradient.dtype)
            state.update(step=torch.zeros(()), first=zeros, second=zeros, covariance=square, basis=square)
        state["step"] = state["step"] + 1
        step, (b1, b2), keep = int(state["step"]), group["betas"], group["covariance"]
        state["covariance"] = keep * state["covariance"] + (1 - keep) * torch.outer(gradient, gradient)
        if step < 10 or step % max(5, len(gradient) // 20) == 0:
            # Contiguous, as a checkpoint gives it back: the order of strides decides how a product rounds.
            basis = torch.linalg.eigh(state["covariance"])[1].contiguous()
            # Second moments follow into the new basis as if the old coordinates were independent.
            state["second"] = (basis.T @ state["basis"]).square() @ state["second"]
            state["basis"] = basis
        basis = state["basis"]
        state["first"] = b1 * state["first"] + (1 - b1) * gradient
        state["second"] = b2 * state["second"] + (1 - b2) * (basis.T @ gradient).square()
        first = basis.T @ state["first"] / (1 - b1**step)
        second = state["second"] / (1 - b2**step)
        every.update({f"{mark}{name}": value for name, value in state.items()})
        update = basis @ (first / (second.sqrt() + group["eps"]))
        update = update if span is None else span @ update
        for p, part in zip(params, update.split([p.numel() for p in params]), strict=True):
            p -= group["lr"] * part.view_as(p)
