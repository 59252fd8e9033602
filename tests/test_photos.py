"""The embedded photographs: their crops, their network, and what it makes."""

from __future__ import annotations

import pytest
import torch

from gas_engine import load_denoiser, rollout
from gas_engine.adapters.digits import ASSETS
from gas_engine.adapters.photos import SCALES, labelled_crops, photo_crops
from gas_engine.denoiser import seeded
from gas_engine.solvers.named import named_solver


@pytest.fixture(scope="module")
def photos():
    return load_denoiser("photos")


def test_crops_follow_from_the_generator_and_lie_in_range():
    first, again = (photo_crops(64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (64, 3, 32, 32) and first.dtype == torch.float32
    assert -1 <= float(first.min()) < -0.5 and 0.5 < float(first.max()) <= 1


def test_every_photograph_is_drawn_at_every_scale():
    crops, labels = labelled_crops(2000, torch.Generator().manual_seed(0))
    counts = torch.bincount(labels)
    assert len(counts) == 6 * len(SCALES) and counts.min() > 60
    # A smaller scale shows more of a photograph, so neighbouring pixels differ more.
    roughness = (crops[..., 1:] - crops[..., :-1]).abs().mean((1, 2, 3))
    by_scale = [float(roughness[labels % len(SCALES) == i].mean()) for i in range(len(SCALES))]
    assert by_scale == sorted(by_scale, reverse=True)


def test_the_network_is_small_frozen_and_without_classes(photos):
    assert photos.shape == (3, 32, 32) and photos.classes is None
    assert not any(p.requires_grad for p in photos.network.parameters())
    assert 4 * sum(p.numel() for p in photos.network.parameters()) <= 16e6


def test_the_network_makes_larger_pictures(photos, tmp_path):
    """The same weights at another size, under a name that says so; at its own size nothing changes."""
    larger = load_denoiser("photos", 48)
    assert (larger.shape, larger.name) == ((3, 48, 48), "photos at 48 px")
    assert load_denoiser("photos", 32).name == photos.name and larger.fingerprint() != photos.fingerprint()
    noise = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    x = 0.1 * noise
    with torch.no_grad():
        inner = photos(x[..., 8:40, 8:40].contiguous(), torch.tensor(0.1))[..., 8:24, 8:24]
        assert (larger(x, torch.tensor(0.1))[..., 16:32, 16:32] - inner).abs().mean() < 0.05, "a U-Net sees near by"
    path = tmp_path / "digits.safetensors"
    path.write_bytes((ASSETS / "digits.safetensors").read_bytes())
    assert load_denoiser(str(path), 12).name == f"{path} at 12 px"


@pytest.mark.parametrize("pixels", [30, 4, 0, -8])
def test_sizes_that_the_network_cannot_halve_are_refused(pixels):
    with pytest.raises(ValueError, match=f"a resolution of {pixels} was given; photos takes multiples of 4 above it"):
        load_denoiser("photos", pixels)


def test_denoising_is_much_better_than_doing_nothing(photos):
    """At noise of 0.2 the network's estimate of clean crops is nearer than the noisy ones by far."""
    clean = photo_crops(32, torch.Generator().manual_seed(1))
    sigma = 0.2
    t = photos.schedule.inverse(-torch.tensor(sigma, dtype=torch.float64).log())
    alpha = float(photos.schedule(t)[0])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        guess = photos(alpha * (clean + sigma * noise), t, None)
    assert float((guess - clean).square().mean()) < 0.2 * sigma**2


def test_samples_have_the_colours_and_the_detail_of_the_data(photos):
    """Twenty evaluations: spread and roughness of 48 samples lie near those of as many crops."""
    noise, cond = seeded(photos, range(48))
    with torch.no_grad():
        samples = rollout(photos, noise, named_solver("unipc", photos.schedule, 20, "logSNR"), cond)
    crops = photo_crops(48, torch.Generator().manual_seed(5))
    for measure in (lambda x: x.std(), lambda x: (x[..., 1:] - x[..., :-1]).square().mean().sqrt()):
        assert 0.75 < float(measure(samples) / measure(crops)) < 1.3
