"""What a model is told beside x and t, as a function of seeds.

A condition is None, a tensor [B, ...], or a dict or list of them. One of a batch of one, [1, ...], belongs to all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_map

Range = tuple[float, float]
SCALES = 3  # of a range of guidance: a solver's tables are learned at each and interpolated between


class Conditioning:
    """Conditions by seeds; a model that is told nothing has none. Derive from it, and say ``draw``.

    ``classes``: their number, where a condition is the index of a class. ``null``: the condition that says nothing,
    with a batch of one, for classifier-free guidance; None where the model has none. ``takes_prompts``: it is text, and
    ``told`` makes the conditioning of prompts. ``guidance_input``: the scale of guidance is a part of the condition.
    """

    classes: int | None = None
    null: Any = None
    takes_prompts = False
    guidance_input = False

    def told(self, prompts: str | list[str] | None, negative: str, guidance: float | Range | None) -> Conditioning:
        """The conditioning of a file of prompts, of the prompt itself, or of a list of them; ``guidance`` for a model
        that takes it."""
        raise ValueError("this model takes no prompts")

    def of(self, texts: list[str]) -> Conditioning:
        """The same with other prompts, where row n is told text n."""
        raise ValueError("this model takes no prompts")

    def draw(self, seeds: Sequence[int], generators: Sequence[Generator]) -> Any:
        """Conditions of the seeds, on the CPU, [len(seeds), ...].

        ``generators``: one for each seed, from which its noise was drawn before.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What the samples of a seed depend on, beside the network's weights; plain JSON."""
        return {}


class Classes(Conditioning):
    """A class drawn for each seed, int64 [B], of ``count``; ``null``: the index of the learned class of none.

    denoiser = Denoiser(function, schedule, "noise", (4, 32, 32), conditioning=Classes(1000, null=1000))
    """

    def __init__(self, count: int, null: int | None = None) -> None:
        if count < 1:
            raise ValueError(f"a class-conditional model has at least one class, got {count}")
        self.classes = count
        self.null = None if null is None else torch.tensor([null])

    def draw(self, seeds: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        """Classes of the seeds, int64 [len(seeds)], evenly drawn."""
        assert self.classes is not None
        return torch.stack([torch.randint(self.classes, (), generator=generator) for generator in generators])


class WithGuidance(Conditioning):
    """A condition and a guidance scale [B], of a range, for each seed: ``{"cond", "guidance"}``."""

    def __init__(self, inner: Conditioning | None, scales: Range) -> None:
        self.inner, self.scales = inner, scales
        self.classes = None if inner is None else inner.classes

    def draw(self, seeds: Sequence[int], generators: Sequence[Generator]) -> dict[str, Any]:
        cond = None if self.inner is None else self.inner.draw(seeds, generators)
        return {"cond": cond, "guidance": scales(self.scales, seeds)}

    def facts(self) -> dict[str, Any]:
        return {} if self.inner is None else self.inner.facts()


def scale_of(scale: float | Range, seed: int) -> float:
    """The guidance scale of a seed: that of all, or one of the ``nodes`` of a range.

    Seeds 3n to 3n + 2 have each of three once, in an order drawn for them.
    """
    if not isinstance(scale, tuple):
        return float(scale)
    block, place = divmod(int(seed), SCALES)
    return nodes(scale)[int(torch.randperm(SCALES, generator=torch.Generator().manual_seed(~block))[place])]


def nodes(scales: Range, count: int = SCALES) -> list[float]:
    """Scales of a range that polynomials in log(1 + scale) are determined at: its ends and, between, the extrema of
    Chebyshev's polynomial of degree ``count - 1``."""
    low, high = map(math.log1p, scales)
    places = (0.5 - 0.5 * math.cos(math.pi * j / (count - 1)) for j in range(1, count - 1))
    return [scales[0], *(math.expm1(low + place * (high - low)) for place in places), scales[1]]


def scales(scale: float | Range, seeds: Sequence[int]) -> Tensor:
    """Guidance scales of seeds [B], float32."""
    return torch.tensor([scale_of(scale, seed) for seed in seeds])


def take(cond: Any, rows: slice | list[int], batch: int) -> Any:
    """The rows of a condition; what has a batch of one belongs to all."""

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return leaf
        if len(leaf) not in (1, batch):
            raise ValueError(f"a condition of shape {list(leaf.shape)} beside a batch of {batch}")
        return leaf if len(leaf) == 1 else leaf[rows]

    return tree_map(part, cond)


def moved(cond: Any, device: torch.device | str) -> Any:
    """The condition on a device; nothing waits for the copy."""
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, cond)
