"""Figures of sets of samples, each a function of features [N, F] or of images [N, C, H, W].

| | of | source |
|---|---|---|
| `frechet_distance` (FID, sFID) | features, or published statistics | arXiv 1706.08500 |
| `kernel_distance` (KID) | features | arXiv 1801.01401 |
| `gaussian_distance` (CMMD) | features | arXiv 2401.09603 |
| `neighbours`: precision, recall, density, coverage | features | arXiv 1904.06991, 2002.09797 |
| `diversity` | features | |
| `radial_power`, `high_frequency_power` | images | |

Features come from `features_of(model)`, `torchscript_features(file)` or `inception_features()`.
"""

from .features import (
    Extractor,
    Features,
    embedded_features,
    features_of,
    real_digits,
    torchscript_features,
)
from .frechet import Normal, diversity, frechet_distance
from .inception import inception_features
from .judge import Judge, judge_of
from .kernels import gaussian_distance, kernel_distance
from .neighbours import Neighbours, neighbours
from .spectrum import high_frequency_power, radial_power, rings

__all__ = [
    "Extractor", "Features", "Judge", "Neighbours", "Normal", "diversity", "embedded_features",
    "features_of", "frechet_distance", "gaussian_distance", "high_frequency_power", "inception_features", "judge_of",
    "kernel_distance", "neighbours", "radial_power", "real_digits", "rings", "torchscript_features",
]  # fmt: skip
