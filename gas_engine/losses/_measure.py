"""What a distance is made of, and how it is taken: by chunks of samples and by tiles, with what is known kept.

Shape legend: B batch, b samples of one chunk, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import phase

Made = tuple[Tensor, ...]
Values = Callable[[Tensor, slice], Tensor]  # of the samples of a chunk, and their rows in the batch


class Measure:
    """A distance of samples: ``of(x, y, made(y)) -> [b]``; ``made`` is what depends on the teacher's samples alone.

    ``pieces``: parts of a sample [C, H, W], each with a measure and a weight, whose weighted sum is the whole.
    ``makes``: how many tensors ``made`` gives, each [b, ...]. ``weight_bytes``: of the networks that it holds.
    """

    makes = weight_bytes = 0

    def pieces(self, shape: Sequence[int]) -> list[Piece]:
        return [Piece((), self, 1.0)]

    def made(self, y: Tensor) -> Made:
        return ()

    def of(self, x: Tensor, y: Tensor, made: Made) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Piece:
    """``weight`` times a measure of ``x[:, *window]``."""

    window: tuple[slice, ...]
    measure: Measure
    weight: float


class Cache:
    """What was made of the teacher's samples, by row and piece, in host memory up to ``limit`` bytes.

    First come, first kept: shuffled epochs come back to every row equally soon. The samples are made one by one, so
    that no value depends on what is kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.hits, self.misses = limit, 0, 0, 0
        self._kept: dict[tuple[int, int], Made] = {}

    def made(self, piece: int, rows: Sequence[int], y: Tensor, make: Callable[[Tensor], Made]) -> Made:
        """``make(y)`` of the samples y [b, ...] with these rows of the teacher set."""
        ones = [self._one(piece, row, sample, make) for row, sample in zip(rows, y.split(1), strict=True)]
        return tuple(torch.cat(parts) for parts in zip(*ones, strict=True))

    def _one(self, piece: int, row: int, y: Tensor, make: Callable[[Tensor], Made]) -> Made:
        if (kept := self._kept.get((piece, row))) is not None:
            self.hits += 1
            return tuple(t.to(y.device, non_blocking=True) for t in kept)
        self.misses += 1
        made = make(y)
        size = sum(t.nbytes for t in made)
        if self.bytes + size <= self.limit:
            with phase("host"):
                self._kept[piece, row] = tuple(
                    torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t) for t in made
                )
            self.bytes += size
        return made


class ByPieces(torch.autograd.Function):
    """Sums over pieces of values [B], ``chunk`` samples of one piece at a time, with their gradients on the spot.

    As a value depends on its own sample alone, d value / d sample is all that is kept: memory like x, and the graph of
    one chunk of one piece while it is made. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk: int, pieces: list[tuple[tuple[slice, ...], Values, float]]) -> Tensor:  # type: ignore[override]
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(x) if wanted else None
        whole = []
        for start in range(0, len(x), chunk):
            rows = slice(start, min(start + chunk, len(x)))
            value: Any = 0
            for window, values, weight in pieces:
                where = (rows, slice(None), *window)
                part = x[where].detach()
                with torch.set_grad_enabled(wanted):
                    v = weight * values(part.requires_grad_(wanted), rows)
                    if gradient is not None:
                        gradient[where] += torch.autograd.grad(v.sum(), part)[0]
                value = value + v.detach()
                del v, part
            whole.append(value)
        ctx.save_for_backward(gradient)
        return torch.cat(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * g.view(-1, *[1] * (gradient.ndim - 1)).to(gradient.dtype), None, None
