"""The metrics against published implementations: torch-fidelity, clean-fid, prdc; and by hand where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gas_engine.metrics import (
    Normal,
    frechet_distance,
    gaussian_distance,
    kernel_distance,
    kernels,
    neighbours,
    radial_power,
    rings,
)


def features(n, f, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(f, f, generator=generator, dtype=torch.float64) / f**0.5
    return (torch.randn(n, f, generator=generator, dtype=torch.float64) @ mix * scale + 0.1 * seed).float()


PAIRS = [(features(n, f, 0), features(m, f, 1, 0.8)) for n, m, f in ((300, 200, 16), (500, 400, 64))]


def statistics(x):
    return np.mean(x.numpy(), axis=0, dtype=np.float64), np.cov(x.numpy().astype(np.float64), rowvar=False)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_frechet_distance_is_torch_fidelitys(a, b):
    fidelity = pytest.importorskip("torch_fidelity.metric_fid", reason="needs `pip install torch-fidelity`")
    one, two = (dict(zip(("mu", "sigma"), statistics(x), strict=True)) for x in (a, b))
    wanted = fidelity.fid_statistics_to_metric(one, two, False)[fidelity.KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(a, Normal.of_statistics(two["mu"], two["sigma"])) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_frechet_and_kernel_distance_are_clean_fids(a, b):
    reason = "needs `pip install --no-deps clean-fid` and a scipy whose sqrtm takes disp"
    fid = pytest.importorskip("cleanfid.fid", reason=reason, exc_type=Exception)
    try:
        wanted = fid.frechet_distance(*statistics(a), *statistics(b))
    except TypeError:
        pytest.skip(reason)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    whole = fid.kernel_distance(a[:200].double().numpy(), b.double().numpy()[:200], 1, 200)
    assert kernel_distance(a[:200], b[:200]) == pytest.approx(whole, rel=1e-6)


def test_kernel_distance_is_torch_fidelitys_on_its_subsets():
    """The mean over torch-fidelity's own random subsets; of all samples at once it has the same expectation."""
    fidelity = pytest.importorskip("torch_fidelity.metric_kid", reason="needs `pip install torch-fidelity`")
    a, b = (x.double() for x in PAIRS[1])
    options = {"kid_subsets": 20, "kid_subset_size": 150, "rng_seed": 2020, "verbose": False}
    wanted = fidelity.kid_features_to_metric(a, b, **options)
    rng, ours = np.random.RandomState(2020), []
    for _ in range(20):
        rows = [rng.choice(len(x), 150, replace=False) for x in (a, b)]
        ours.append(kernel_distance(a[rows[0]], b[rows[1]]))
    assert np.mean(ours) == pytest.approx(wanted[fidelity.KEY_METRIC_KID_MEAN], rel=1e-9)
    spread = wanted[fidelity.KEY_METRIC_KID_STD]
    assert abs(kernel_distance(a, b) - np.mean(ours)) < spread


def test_kernels_by_blocks_are_those_at_once(monkeypatch):
    a, b = PAIRS[0]
    at_once = kernel_distance(a, b), gaussian_distance(a, b), neighbours(a, b)
    monkeypatch.setattr(kernels, "BLOCK", 700)
    by_blocks = kernel_distance(a, b), gaussian_distance(a, b), neighbours(a, b)
    assert by_blocks[:2] == pytest.approx(at_once[:2], rel=1e-9) and by_blocks[2] == pytest.approx(at_once[2])


def test_gaussian_distance_written_out():
    """1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)) of unit vectors, width 10, diagonals included."""
    x, y = (v.double() / v.double().norm(dim=1, keepdim=True) for v in PAIRS[0])

    def mean(a, b):
        return float(torch.exp(-(a[:, None] - b[None]).square().sum(-1) / 200).mean())

    wanted = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert gaussian_distance(*PAIRS[0]) == pytest.approx(wanted, rel=1e-6)
    assert gaussian_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_are_those_of_prdc(a, b, k, capsys):
    prdc = pytest.importorskip("prdc", reason="needs `pip install --no-deps prdc` and scikit-learn")
    wanted = prdc.compute_prdc(a.double().numpy(), b.double().numpy(), k)
    assert neighbours(a, b, k, k)._asdict() == pytest.approx(wanted, rel=1e-12)


def test_neighbours_by_hand():
    """On a line: balls of real samples reach 1, those of fake ones 1.5; two fakes lie outside all of them."""
    real, fake = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.5], [2.0], [10.0], [11.5]])
    found = neighbours(real, fake, 1, 1)
    assert found.precision == 0.5 and found.coverage == 1 and found.recall == 1
    assert found.density == pytest.approx((2 + 1) / 4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3))
def test_rings_hold_the_mean_square(height, width, channels, count):
    images = torch.randn(count, channels, height, width, dtype=torch.float64)
    frequencies, counts = rings(height, width)
    power = radial_power(images)
    assert frequencies.shape == counts.shape == power.shape and counts.sum() == height * width
    assert float((power * counts).sum()) == pytest.approx(float(images.square().mean()), rel=1e-9)


def test_a_wave_lies_in_its_ring():
    wave = torch.cos(2 * torch.pi * 3 / 16 * torch.arange(16.0)).expand(1, 1, 16, 16)
    power, (frequencies, counts) = radial_power(wave), rings(16, 16)
    assert int((power * counts).argmax()) == 3 and float(frequencies[3]) == 3 / 16
    assert float(power[3] * counts[3]) == pytest.approx(0.5)


def test_statistics_of_features_are_their_normal():
    a, b = PAIRS[0]
    both = Normal.of_statistics(*statistics(a)), Normal.of_statistics(*statistics(b))
    assert frechet_distance(*both) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    few = a[:5]  # a singular covariance
    assert frechet_distance(Normal.of_statistics(*statistics(few)), b) == pytest.approx(
        frechet_distance(few, b), rel=1e-6
    )


@pytest.mark.parametrize(
    ("mu", "sigma", "seen"),
    [
        (np.zeros(3), np.eye(2), r"\[3\] and \[2, 2\]"),
        (np.zeros((1, 3)), np.eye(3), r"\[1, 3\]"),
        (np.zeros(2), np.diag([1.0, -1.0]), "eigenvalue of -1"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (np.full(2, np.nan), np.eye(2), "finite"),
    ],
)
def test_what_is_no_covariance_is_refused(mu, sigma, seen):
    with pytest.raises(ValueError, match=seen):
        Normal.of_statistics(mu, sigma)


def test_sets_that_do_not_fit_are_refused():
    for metric in (kernel_distance, gaussian_distance, neighbours):
        with pytest.raises(ValueError, match=r"\[4, 3\], \[4, 2\]"):
            metric(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="5 nearest neighbours"):
        neighbours(torch.zeros(5, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"\[16\], \[300, 4\]"):
        frechet_distance(Normal.of(PAIRS[0][0]), torch.zeros(300, 4))
