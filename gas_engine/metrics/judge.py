"""Frechet distances of a training run's samples to the data and to the teacher, for models with embedded features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .features import Features, features_of
from .frechet import frechet_distance
from .reference import embedded_data


@dataclass(frozen=True)
class Judge:
    """Features by which samples are judged, and those of the data, [M, F]."""

    features: Features
    data: Tensor

    def distances(self, samples: Tensor, teacher: Tensor) -> tuple[float, float] | None:
        """Frechet distances of samples [N, ...] to the data and to the teacher; None if not all are finite."""
        if not bool(samples.isfinite().all()):
            return None
        mine = self.features(samples)
        return frechet_distance(mine, self.data), frechet_distance(mine, self.features(teacher))


def judge_of(model: str) -> Judge | None:
    """The judge that comes with a model; None for models without embedded features."""
    extractor, data = features_of(model), embedded_data(model)
    if extractor is None or data is None:
        return None
    return Judge(extractor.features, extractor.features(data))
