"""Frechet distance against scipy's matrix root and normal distributions by hand; power and diversity by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gas_engine.adapters.digits import HELD_OUT, digit_images
from gas_engine.metrics import (
    diversity,
    embedded_features,
    frechet_distance,
    high_frequency_power,
    real_digits,
)


def features(n, f, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(f, f, generator=generator, dtype=torch.float64)
    return torch.randn(n, f, generator=generator, dtype=torch.float64) @ mix * scale + seed


@pytest.mark.parametrize(("n", "m", "f"), [(200, 150, 8), (40, 300, 16), (64, 64, 1)])
def test_frechet_distance_is_the_one_with_a_matrix_root(n, m, f):
    linalg = pytest.importorskip("scipy.linalg", reason="needs scipy, which scikit-learn brings")
    a, b = features(n, f, 0), features(m, f, 1, 0.5)
    c, d = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    root = linalg.sqrtm(c @ d).real
    wanted = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(c + d - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)


def test_frechet_distance_of_axis_aligned_normals():
    """Points +-s_i e_i have a diagonal covariance: the distance is |mu - mu'|^2 + sum (s_i - s_i')^2."""
    f = 5
    unit = torch.cat([torch.eye(f), -torch.eye(f)]).double() * math.sqrt((2 * f - 1) / 2)
    s, t, shift = torch.rand(f).double(), torch.rand(f).double(), torch.randn(f).double()
    wanted = float(shift.square().sum() + (s - t).square().sum())
    assert frechet_distance(unit * s, unit * t + shift) == pytest.approx(wanted, rel=1e-12)


def test_frechet_distance_with_fewer_samples_than_features():
    """Singular covariances: exact after a rotation that shows their few dimensions, and 0 for a set and itself."""
    a, b = features(6, 3, 0), features(7, 3, 1)
    turn = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))[0][:3]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    size = float((a @ turn).square().sum())
    assert abs(frechet_distance(a @ turn, a @ turn)) < 1e-13 * size
    shuffled = (a @ turn)[torch.randperm(6)]
    assert abs(frechet_distance(a @ turn, shuffled)) < 1e-13 * size


def test_frechet_distance_is_symmetric_and_in_float64():
    a, b = features(100, 8, 0).float(), features(100, 8, 1).float()
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


def test_frechet_distance_refuses_what_has_no_distance():
    with pytest.raises(ValueError, match=r"\[4, 3\], \[4, 2\]"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(torch.full((4, 3), math.nan), torch.zeros(4, 3))


def test_diversity_is_half_the_mean_squared_distance_of_two():
    x = features(30, 4, 2)
    pairs = torch.cdist(x, x).square().sum() / (30 * 29)
    assert diversity(x) == pytest.approx(float(pairs) / 2, rel=1e-10)
    assert diversity(x[:1].expand(5, -1)) == 0
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        diversity(x[:1])


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_high_frequency_power_of_waves(size):
    """A cosine of amplitude a has mean square a^2 / 2; only what is above half of Nyquist counts."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    low, high = torch.cos(2 * math.pi * x / 8), torch.cos(2 * math.pi * 3 / 8 * y)
    images = (0.7 + 0.5 * low + 0.25 * high).expand(3, 2, -1, -1)
    assert high_frequency_power(images) == pytest.approx(0.25**2 / 2, rel=1e-12)
    assert high_frequency_power(2 * images) == pytest.approx(0.25**2 * 2, rel=1e-12)
    with pytest.raises(ValueError, match=r"\[8\]"):
        high_frequency_power(torch.zeros(8))


def test_high_frequency_power_falls_by_blur():
    images = real_digits()[:64]
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert high_frequency_power(blurred) < 0.2 * high_frequency_power(images)


def test_features_of_the_digits_tell_digits():
    """The held-out images, classified by a linear head over the features, as the asset says."""
    extract, (images, classes) = embedded_features("digits"), digit_images()
    got = extract(images[:HELD_OUT])
    assert got.shape == (HELD_OUT, 64) and got.dtype == torch.float32 and not got.requires_grad
    centres = torch.stack([extract(real_digits()[classes[HELD_OUT:] == k]).mean(0) for k in range(10)])
    nearest = torch.cdist(got, centres).argmin(1)
    assert float((nearest == classes[:HELD_OUT]).float().mean()) > 0.96
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 8\]"):
        extract(torch.zeros(2, 3, 8, 8))


def test_the_held_out_digits_are_near_and_noise_is_far():
    extract, (images, _) = embedded_features("digits"), digit_images()
    real, held = extract(real_digits()), extract(images[:HELD_OUT])
    near, far = frechet_distance(held, real), frechet_distance(extract(torch.randn(HELD_OUT, 1, 8, 8)), real)
    assert far > 20 * near
