"""Distances between a student's and its teacher's samples.

Shape legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from ._measure import ByPieces, Cache, Made, Measure
from .perceptual import NETWORKS, Perceptual

Loss = Callable[..., Tensor]  # (student, teacher), and the teacher's rows where the loss can use them -> [B]
LOSSES = ("l1", "l2", "huber", *NETWORKS)
HUBER = 0.1


class DistillationLoss:
    """``loss(student, teacher)``: x, y [B, C, H, W] -> one value per sample, [B]; gradients for x alone.

    ``chunk`` samples at a time (all unless given), exactly, with the gradient taken on the spot: at most the graph of
    one chunk is alive, and d value / d x is what is kept of it; then differentiable once. ``cache``: bytes of host
    memory for what is made of the teacher's samples, such as their features, if a call says which ``rows`` of the
    teacher set they are; the same values with or without (to rounding, if chunk is not 1: they are made one by one).
    Raises ValueError for x and y of two shapes, rows that do not fit them, or a chunk below 1.

        values = loss(student, teacher, rows)
    """

    def __init__(self, measure: Measure, chunk: int | None = None, cache: int = 0) -> None:
        if (chunk is not None and chunk < 1) or cache < 0:
            raise ValueError(f"chunk must be at least 1 and cache at least 0 bytes, got {chunk} and {cache}")
        self.measure, self.chunk = measure, chunk
        self.cache = Cache(cache) if cache else None

    @property
    def weight_bytes(self) -> int:
        """Of the networks that the loss holds."""
        return self.measure.weight_bytes

    def __call__(self, x: Tensor, y: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        if x.shape != y.shape:
            raise ValueError(f"student and teacher must have one shape, got {list(x.shape)} and {list(y.shape)}")
        if rows is not None and len(rows) != len(y):
            raise ValueError(f"{len(rows)} rows of the teacher set for {len(y)} samples")
        pieces = []
        for number, piece in enumerate(self.measure.pieces(x.shape[1:])):
            window = (slice(None), slice(None), *piece.window)
            target = y.detach()[window]
            pieces.append((piece.window, self._values(number, piece.measure, target, rows), piece.weight))
        if self.chunk is None and len(pieces) == 1:
            return pieces[0][1](x, slice(None))
        return ByPieces.apply(x, self.chunk or len(x), pieces)

    def _values(
        self, number: int, measure: Measure, y: Tensor, rows: Sequence[int] | None
    ) -> Callable[[Tensor, slice], Tensor]:
        def values(part: Tensor, where: slice) -> Tensor:
            with torch.no_grad():
                if self.cache is None or rows is None or not measure.makes:
                    made = measure.made(y[where])
                else:
                    made = self.cache.made(number, rows[where], y[where], measure.made)
            return measure.of(part, y[where], made)

        return values


def distillation_loss(
    name: str, device: torch.device | None = None, *, chunk: int | None = None, cache: int = 0, trained: bool = True
) -> DistillationLoss:
    """The loss of this name, or a weighted sum of some: ``"lpips + 0.1 * l1"``.

    "l1": mean |x - y|; "l2": mean (x - y)^2; "huber": mean of d^2 / (2 delta) where d = |x - y| < delta, else
    d - delta/2 (Huber 1964, in the scale of l1), delta = 0.1 unless given as in "huber:0.03"; "lpips", "lpips-alex",
    "lpips-squeeze": LPIPS (arXiv 1801.03924) with VGG-16 (arXiv 2510.17699, section 4), AlexNet or SqueezeNet on
    images in [-1, 1], resized and clipped as ``Perceptual`` says, one sample at a time unless ``chunk`` is given.
    ``chunk``, ``cache``: see ``DistillationLoss``. ``trained=False``: LPIPS of random weights, to measure bytes with.
    Raises ValueError for anything else, or when LPIPS cannot be set up, saying why.

        loss = distillation_loss("l1")(student, teacher).mean()
    """
    device = device or torch.device("cpu")
    terms = [(weight, _measure(kind, delta, device, trained)) for weight, kind, delta in _terms(name)]
    measure = terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Mixed(terms)
    if chunk is None and measure.weight_bytes:
        chunk = 1
    return DistillationLoss(measure, chunk, cache)


class Pointwise(Measure):
    """Mean over the elements of a sample."""

    def __init__(self, elements: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.elements = elements

    def of(self, x: Tensor, y: Tensor, made: Made) -> Tensor:
        return self.elements(x, y).flatten(1).mean(1)


class Mixed(Measure):
    """A weighted sum of measures."""

    def __init__(self, terms: list[tuple[float, Measure]]) -> None:
        self.terms = terms
        self.weight_bytes = sum(measure.weight_bytes for _, measure in terms)
        self.makes = sum(measure.makes for _, measure in terms)

    def made(self, y: Tensor) -> Made:
        return tuple(t for _, measure in self.terms for t in measure.made(y))

    def of(self, x: Tensor, y: Tensor, made: Made) -> Tensor:
        rest = iter(made)
        values = [w * measure.of(x, y, tuple(islice(rest, measure.makes))) for w, measure in self.terms]
        return torch.stack(values).sum(0)


def _terms(name: str) -> list[tuple[float, str, float]]:
    """Weight, kind and delta of every term."""
    found = []
    for words in name.split("+"):
        weight, star, kind = words.rpartition("*")
        kind, colon, number = kind.strip().partition(":")
        try:
            factor = float(weight) if star else 1.0
            delta = float(number) if colon else HUBER
        except ValueError:
            factor = delta = math.nan
        if not (0 < factor < math.inf and 0 < delta < math.inf) or kind not in LOSSES or (colon and kind != "huber"):
            raise ValueError(
                f"unknown loss {name!r}; known: {', '.join(LOSSES)}, with positive weights as in 'lpips + 0.1 * l1', "
                "and a positive delta as in 'huber:0.03'"
            )
        found.append((factor, kind, delta))
    return found


def _measure(kind: str, delta: float, device: torch.device, trained: bool) -> Measure:
    if kind in NETWORKS:
        return Perceptual(kind, device, trained)
    if kind == "huber":
        return Pointwise(lambda x, y: F.smooth_l1_loss(x, y, reduction="none", beta=delta))
    return Pointwise((lambda x, y: (x - y).abs()) if kind == "l1" else (lambda x, y: (x - y).square()))
