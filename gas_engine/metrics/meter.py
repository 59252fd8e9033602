"""What is kept of samples while they stream by: sums of their distances and spectra, and their features.

A measurement is a dict of tensors; all are sums over samples but ``features`` [N, F] and ``spatial`` [N, S].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..losses.perceptual import Perceptual
from ..pictures import pictures_of
from .features import Extractor
from .frechet import Normal, diversity, frechet_distance
from .kernels import gaussian_distance, kernel_distance
from .neighbours import neighbours
from .reference import Reference
from .spectrum import high_frequency_power, radial_power

Measured = dict[str, Tensor]
DISTANCES = ("l1", "l2", "rmse", "psnr", "lpips")
OF_FEATURES = ("fd_data", "fd_teacher", "kid_data", "precision", "recall", "density", "coverage", "diversity")
METRICS = (*DISTANCES, *OF_FEATURES, "detail", "sfid", "cmmd")
LISTS = ("features", "spatial")
PER_SAMPLE = 5  # more neighbours than samples have no radius


@dataclass(frozen=True)
class Meter:
    """Measures batches of states; what it is not given, it leaves out."""

    extractor: Extractor | None = None
    perceptual: Perceptual | None = None
    spatial: bool = False

    def samples(self, denoiser: Denoiser, states: Tensor, teacher: Tensor, device: torch.device) -> Measured:
        """Of states [b, *shape] beside the teacher's of the same seeds; pictures are decoded for what needs them."""
        error = (states.cpu() - teacher.cpu()).double()
        found = {
            "count": torch.tensor(len(states), dtype=torch.float64),
            "l1": error.abs().flatten(1).mean(1).sum(),
            "l2": error.square().flatten(1).mean(1).sum(),
        }
        if not bool(states.isfinite().all()) or states.ndim != 4:
            return found
        pictures = pictures_of(denoiser, states, device)
        if self.perceptual is not None:
            theirs = pictures_of(denoiser, teacher, device)
            found["lpips"] = self._lpips(pictures, theirs, device)
        return found | self.pictures(pictures)

    def pictures(self, pictures: Tensor) -> Measured:
        """Of pictures [b, C, H, W] alone."""
        count = torch.tensor(len(pictures), dtype=torch.float64)
        found = {"count": count, "power": count * radial_power(pictures)}
        found["high"] = count * high_frequency_power(pictures)
        if self.extractor is not None:
            found["features"], spatial = self.extractor.both(pictures)
            if self.spatial and spatial is not None:
                found["spatial"] = spatial
        return found

    def _lpips(self, x: Tensor, y: Tensor, device: torch.device) -> Tensor:
        measure, total = self.perceptual, torch.zeros((), dtype=torch.float64)
        assert measure is not None
        with torch.no_grad():
            for one, other in zip(x.to(device).split(1), y.to(device).split(1), strict=True):
                total += measure.of(one, other, measure.made(other)).double().sum().cpu()
        return total


def joined(parts: Sequence[Measured]) -> Measured:
    """The measurement of all samples, from those of batches; of what every batch has."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {
        name: torch.cat([part[name] for part in parts]) if name in LISTS else sum(part[name] for part in parts)  # type: ignore[misc]
        for name in names
    }


def sums(measured: Measured) -> Measured:
    """A measurement without its features, which are most of its bytes."""
    return {name: value for name, value in measured.items() if name not in LISTS}


@dataclass(frozen=True)
class Yardstick:
    """What samples are scored by: the measurements of the teacher and of the data, and statistics of the data."""

    teacher: Measured
    data: Measured | None = None
    normal: Normal | None = None
    spatial: Normal | None = None

    @classmethod
    def of(cls, teacher: Measured, data: Measured | None, reference: Reference | None) -> Yardstick:
        """Published statistics go before those of the images beside them."""
        normal, spatial = (reference.normal, reference.spatial) if reference else (None, None)
        if data is not None and "features" in data:
            normal = normal or Normal.of(data["features"])
        if data is not None and "spatial" in data:
            spatial = spatial or Normal.of(data["spatial"])
        return cls(teacher, data, normal, spatial)

    def scores(self, measured: Measured, wanted: Sequence[str] = METRICS) -> dict[str, float | None]:
        """A number for each of ``wanted``, or None where it cannot be had."""
        found = self._distances(measured) | self._shares(measured, wanted)
        return {name: found.get(name) for name in wanted}

    def _distances(self, measured: Measured) -> dict[str, float | None]:
        count = float(measured["count"])
        names = ("l1", "l2", "lpips", "high")
        mean: dict[str, float] = {name: float(measured[name]) / count for name in names if name in measured}
        found: dict[str, float | None] = {**mean, "rmse": mean["l2"] ** 0.5}
        found["psnr"] = 10 * math.log10(4 / mean["l2"]) if 0 < mean["l2"] < math.inf else None
        if "high" in mean and float(self.teacher["high"]) > 0:
            found["detail"] = mean["high"] / (float(self.teacher["high"]) / float(self.teacher["count"]))
        return found

    def _shares(self, measured: Measured, wanted: Sequence[str]) -> dict[str, float | None]:
        mine = measured.get("features")
        found: dict[str, float | None] = {}
        if mine is None or len(mine) < 2 or not bool(mine.isfinite().all()):
            return found
        found["diversity"] = diversity(mine)
        own = Normal.of(mine)
        if measured is self.teacher:
            found["fd_teacher"] = 0.0
        elif "features" in self.teacher:
            found["fd_teacher"] = frechet_distance(own, self.teacher["features"])
        if "fd_data" in wanted and self.normal is not None:
            found["fd_data"] = frechet_distance(own, self.normal)
        if "sfid" in wanted and self.spatial is not None and "spatial" in measured:
            found["sfid"] = frechet_distance(measured["spatial"], self.spatial)
        if self.data is None or "features" not in self.data:
            return found
        data = self.data["features"]
        if "kid_data" in wanted:
            found["kid_data"] = kernel_distance(data, mine)
        if "cmmd" in wanted:
            found["cmmd"] = gaussian_distance(data, mine)
        if {"precision", "recall", "density", "coverage"} & {*wanted} and min(len(data), len(mine)) > PER_SAMPLE:
            found |= neighbours(data, mine)._asdict()
        return found
