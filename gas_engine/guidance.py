"""Classifier-free guidance as a denoiser: two calls of one network, and their weighted sum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .conditioning import Range, WithGuidance
from .denoiser import Denoiser, Weight, weighted_sum


class GuidedDenoiser(Denoiser):
    """See ``guided``."""

    calls = 2

    def __init__(self, base: Denoiser, scale: float | Range, null: Any) -> None:
        drawn = WithGuidance(base.conditioning, scale) if isinstance(scale, tuple) else base.conditioning
        super().__init__(
            None, base.schedule, base.prediction, base.shape, network=base, conditioning=drawn, decoder=base.decoder,
            t_eps=base.t_eps, name=base.name,
        )  # fmt: skip
        self.guidance, self.null = scale, null

    @property
    def base(self) -> Denoiser:
        """The denoiser that is called twice."""
        assert isinstance(self.network, Denoiser)
        return self.network

    def terms(self, cond: Any) -> list[tuple[Weight, Any]]:
        """Weights and conditions of the two calls whose sum the output is."""
        scale: Weight
        if isinstance(self.guidance, tuple):
            scale, cond = cond["guidance"], cond["cond"]
        else:
            scale = self.guidance
        return [(scale, cond), (1.0 - scale, tree_map(_like, self.null, cond))]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        (scale, cond), (rest, null) = self.terms(cond)
        both = self.base(torch.cat([x, x]), t, tree_map(lambda c, n: _two(c, n, len(x)), cond, null))
        return weighted_sum(both.chunk(2), [scale, rest])


def guided(denoiser: Denoiser, scale: float | Range, null: Any) -> Denoiser:
    """Classifier-free guidance: F = scale net(x, t, cond) + (1 - scale) net(x, t, null) (arXiv 2207.12598).

    ``null`` has the structure of ``cond`` (a tensor, or dicts and lists of them), with a batch of one. One network call
    of twice the batch; ``MemoryPolicy(split_guidance=True)`` makes it two, one after the other. Scale 1 returns the
    denoiser itself. Of a ``scale`` (low, high) each seed has one of three: conditions are then
    ``{"cond", "guidance": [B]}``. Raises ValueError for a null that does not fit the condition.

        denoiser = guided(denoiser, 7.5, null=empty_prompt)
    """
    return denoiser if scale == 1.0 else GuidedDenoiser(denoiser, scale, null)


def parse_guidance(text: str) -> float | Range:
    """``"7.5"`` is a scale, ``"2:9"`` a range, of whose three scales each seed has one. Raises ValueError otherwise."""
    low, colon, high = text.partition(":")
    try:
        bounds = float(low), float(high or low)
    except ValueError:
        bounds = math.nan, math.nan
    if not 0 <= bounds[0] <= bounds[1] < math.inf or (colon and not high):
        raise ValueError(f"guidance must be a scale such as 7.5 or a range such as 2:9, got {text!r}")
    return bounds[0] if bounds[0] == bounds[1] else bounds


def _like(null: Any, cond: Any) -> Any:
    if not isinstance(null, Tensor) or not isinstance(cond, Tensor):
        if null is None and cond is None:
            return None
        raise ValueError(
            f"guidance needs a null condition of the same kind as the condition, got {type(null).__name__} beside "
            f"{type(cond).__name__}"
        )
    if null.shape[1:] != cond.shape[1:] or len(null) != 1:
        raise ValueError(
            f"the null condition has shape {list(null.shape)}, but beside a condition of {list(cond.shape)} it must be "
            f"{[1, *cond.shape[1:]]}"
        )
    return null.to(cond.device).expand_as(cond)


def _two(cond: Any, null: Any, batch: int) -> Any:
    if not isinstance(cond, Tensor):
        return None
    return torch.cat([t.expand(batch, *t.shape[1:]) for t in (cond, null)])
