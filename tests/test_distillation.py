"""Losses against torch's own and the lpips package; chunks, tiles and caches against doing it all at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gas_engine.costs import Probe, loss_against_zeros
from gas_engine.losses import VAE, DistillationLoss, decoded, distillation_loss
from gas_engine.losses.distillation import LOSSES
from gas_engine.losses.perceptual import NETWORKS, Perceptual, _Layer
from gas_engine.memory import ByteTracker


def pair(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, *shape, generator=generator, dtype=dtype) * 2 - 1
    return x, y


def value_and_gradient(loss, x, *others):
    """Values [B], and the gradient of their sum with unequal weights."""
    x = x.clone().requires_grad_()
    values = loss(x, *others)
    (gradient,) = torch.autograd.grad((values * torch.arange(1, len(x) + 1)).sum(), x)
    return values.detach(), gradient


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def backbones():
    """LPIPS networks of random weights and non-negative layer weights, by the loss's name."""
    lpips = pytest.importorskip("lpips", reason="needs lpips: pip install lpips torchvision")
    torch.manual_seed(0)
    networks = {}
    for name, (kind, *_) in NETWORKS.items():
        networks[name] = lpips.LPIPS(net=kind, pretrained=True, pnet_rand=True, verbose=False).requires_grad_(False)
    return networks


@pytest.fixture
def random_weights(monkeypatch, backbones):
    """``distillation_loss`` finds these instead of trained weights."""
    import lpips

    by_kind = {NETWORKS[name][0]: network for name, network in backbones.items()}
    monkeypatch.setattr(lpips, "LPIPS", lambda net, **_: by_kind[net])
    return backbones


# Pixels


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("l1", F.l1_loss),
        ("l2", F.mse_loss),
        ("huber", lambda x, y: F.smooth_l1_loss(x, y, beta=0.1)),
        ("huber:0.5", lambda x, y: F.huber_loss(x, y, delta=0.5) / 0.5),
        ("l2 + 0.25*l1", lambda x, y: F.mse_loss(x, y) + 0.25 * F.l1_loss(x, y)),
    ],
)
@pytest.mark.parametrize("chunk", [None, 2])
def test_means_over_elements(name, reference, chunk):
    x, y = pair(3, 2, 4, 4, dtype=torch.float64)
    values, gradient = value_and_gradient(distillation_loss(name, chunk=chunk), x, y)
    one_by_one = value_and_gradient(lambda a, b: torch.stack([reference(*v) for v in zip(a, b, strict=True)]), x, y)
    assert values.shape == (3,)
    assert torch.allclose(values, one_by_one[0], rtol=1e-13)
    assert torch.allclose(gradient, one_by_one[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "name", ["l3", "", "lpips+", "0*l1", "-1*l1", "l1*0.1", "huber:0", "huber:x", "l1:2", "nan*l1"]
)
def test_unknown_loss_is_refused(name):
    with pytest.raises(ValueError, match=r"unknown loss .*lpips-squeeze.*'lpips \+ 0.1 \* l1'"):
        distillation_loss(name)


def test_bad_calls_are_refused():
    x, y = pair(2, 3, 8, 8)
    loss = distillation_loss("l1")
    with pytest.raises(ValueError, match="one shape"):
        loss(x, y[:1])
    with pytest.raises(ValueError, match="3 rows"):
        loss(x, y, [1, 2, 3])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        distillation_loss("l1", chunk=0)


# LPIPS


@pytest.mark.parametrize(("name", "channels"), [("lpips", 3), ("lpips-alex", 1), ("lpips-squeeze", 3)])
def test_lpips_is_that_of_the_package(random_weights, name, channels):
    """With random backbone weights in place of the pretrained: value and gradient after resize and clip."""
    network = random_weights[name]
    x, y = pair(2, channels, 16, 16)
    x = x * 1.5  # some is clipped

    def reference(x, y):
        resized = (F.interpolate(v, size=(224, 224), mode="bilinear").clamp(-1, 1) for v in (x, y))
        return network(*(v.expand(-1, 3, -1, -1) for v in resized)).flatten()

    got, wanted = value_and_gradient(distillation_loss(name), x, y), value_and_gradient(reference, x, y)
    assert got[0].shape == (2,)
    assert torch.allclose(got[0], wanted[0], rtol=2e-5)
    assert relative(got[1], wanted[1]) < 2e-5
    assert float(distillation_loss(name)(y, y).abs().max()) == 0


def test_one_layers_gradient_in_float64():
    f, y = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    weights = torch.rand(5, dtype=torch.float64)
    target = F.normalize(y, dim=1)
    assert torch.autograd.gradcheck(lambda f: _Layer.apply(f, target, weights), f.requires_grad_())
    silent = torch.zeros(1, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(_Layer.apply(silent, target[:1, :, :1, :1], weights).sum(), silent)
    assert bool(gradient.isfinite().all())


def test_lpips_refuses_what_is_no_image(random_weights):
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        distillation_loss("lpips")(*pair(1, 4, 8, 8))


def test_lpips_says_what_is_missing(monkeypatch):
    """A torchvision that does not fit, and no lpips package: two causes, two sentences."""
    import builtins

    real = builtins.__import__

    def failing(missing):
        def load(name, *args, **kwargs):
            if name.split(".")[0] == missing:
                raise RuntimeError("operator torchvision::nms does not exist") if name == "torchvision" else ImportError
            return real(name, *args, **kwargs)

        return load

    monkeypatch.setattr(builtins, "__import__", failing("torchvision"))
    with pytest.raises(ValueError, match=r"torchvision that fits torch .*nms does not exist"):
        distillation_loss("lpips")
    monkeypatch.setattr(builtins, "__import__", failing("lpips"))
    with pytest.raises(ValueError, match="needs the lpips package"):
        distillation_loss("lpips-alex + l1")


def test_mixed_weights(random_weights):
    x, y = pair(2, 3, 16, 16)
    mixed = value_and_gradient(distillation_loss("lpips-alex + 0.1*l1 + 2 * lpips-squeeze"), x, y)
    parts = [value_and_gradient(distillation_loss(name), x, y) for name in ("lpips-alex", "l1", "lpips-squeeze")]
    for got, *wanted in zip(mixed, *parts, strict=True):
        assert relative(got, wanted[0] + 0.1 * wanted[1] + 2 * wanted[2]) < 1e-6


# Chunks


def test_chunks_are_exact_and_small(random_weights):
    """Any chunk gives the same; its peak is that of one chunk, however many samples there are."""
    x, y = pair(5, 3, 16, 16)
    peaks, results = {}, {}
    for chunk in (None, 1, 2):
        loss = DistillationLoss(distillation_loss("lpips-alex").measure, chunk)
        with ByteTracker() as bytes:
            results[chunk] = value_and_gradient(loss, x, y)
        peaks[chunk] = bytes.peak
        assert relative(results[chunk][0], results[None][0]) < 1e-6
        assert relative(results[chunk][1], results[None][1]) < 1e-6
    with ByteTracker() as bytes:
        value_and_gradient(DistillationLoss(distillation_loss("lpips-alex").measure), x[:1], y[:1])
    beside = 8 * x.nbytes  # samples, gradients, values
    assert peaks[1] <= bytes.peak + beside
    assert peaks[2] <= 2 * bytes.peak + beside
    assert peaks[None] > 3.5 * bytes.peak


def test_nothing_but_the_gradient_is_kept(random_weights):
    x, y = pair(3, 3, 16, 16)
    loss = distillation_loss("lpips-alex")
    assert loss.chunk == 1 and distillation_loss("l1").chunk is None
    x.requires_grad_()
    with ByteTracker() as bytes:
        values = loss(x, y)
    assert bytes.live <= x.nbytes + 1024
    with torch.no_grad(), ByteTracker() as quiet:
        assert torch.equal(loss(x, y), values)
    assert quiet.peak <= bytes.peak and quiet.live <= 1024
    values.sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_lpips_keeps_less_than_the_package():
    """One sample, VGG: graph and teacher's features within 2/3 of the package's bytes."""
    lpips = pytest.importorskip("lpips", reason="needs lpips: pip install lpips torchvision")
    x, y = pair(1, 3, 64, 64)
    peaks = []
    network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)
    resized = [F.interpolate(v, size=(224, 224), mode="bilinear") for v in (x, y)]
    for loss, samples in ((distillation_loss("lpips", trained=False), (x, y)), (network, resized)):
        with ByteTracker() as bytes:
            value_and_gradient(lambda a, b, loss=loss: loss(a, b).flatten(), *samples)
        peaks.append(bytes.peak)
    assert peaks[0] < 2 / 3 * peaks[1]


def test_a_plan_sees_the_chunk(tiny):
    """What batches 1 and 2 take tells what any batch takes: a chunk of one is in the numbers of a plan."""
    pytest.importorskip("lpips", reason="needs lpips: pip install lpips torchvision")
    probe = Probe(tiny())
    loss, weights = loss_against_zeros("lpips-alex + l1", probe)
    of_many = distillation_loss("lpips-alex + l1", trained=False)
    one, two = (probe.loss_cost(loss, n)[0] for n in (1, 2))
    six, _ = probe.loss_cost(lambda x, rows: of_many(x, torch.zeros(6, *probe.shape)[rows]), 6)
    target = 6 * 4 * torch.Size(probe.shape).numel()
    assert six - target == pytest.approx(one + 5 * (two - one), abs=2048) and six < 1.1 * one
    assert weights == of_many.weight_bytes > 4 * 2_000_000


# Caches


def test_cached_features_give_the_same_bits(random_weights):
    x, y = pair(4, 3, 16, 16)
    rows = [7, 2, 9, 0]
    plain, cached = distillation_loss("lpips-alex + l1"), distillation_loss("lpips-alex + l1", cache=2**30)
    wanted = value_and_gradient(plain, x, y)
    for expected_hits in (0, 4):
        got = value_and_gradient(lambda a, b: cached(a, b, rows), x, y)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        assert cached.cache.hits == expected_hits
    got = cached(x[[1, 3]], y[[1, 3]], [2, 0])
    assert torch.equal(got, wanted[0][[1, 3]]) and cached.cache.hits == 6 and cached.cache.misses == 4
    cached(x, y)  # no rows: nothing is known about them
    assert cached.cache.misses == 4 and cached.cache.hits == 6


def test_a_cache_stays_within_its_limit(random_weights):
    """What does not fit is made anew; the kept bytes are in host memory, and values do not depend on the cache."""
    x, y = pair(4, 3, 16, 16)
    size = sum(t.nbytes for t in distillation_loss("lpips-alex").measure.made(y[:1]))
    loss = distillation_loss("lpips-alex", cache=2 * size + 100, chunk=3)
    with ByteTracker() as bytes:
        first = loss(x, y, range(4))
    assert loss.cache.bytes == 2 * size == bytes.host
    assert torch.equal(loss(x, y, range(4)), first)
    assert (loss.cache.hits, loss.cache.misses) == (2, 6)
    alone = torch.cat([loss(x[i : i + 1], y[i : i + 1], [i]) for i in range(4)])
    assert torch.allclose(alone, first, rtol=1e-5)


# Decoders


class Upscale(nn.Module):
    """Convolutions that reach 3 latents, twice the size; in float64, so that only formulas can differ."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 5, padding=2)
        self.double().requires_grad_(False)

    def forward(self, z):
        return self.last(F.interpolate(torch.tanh(self.first(z)), scale_factor=2, mode="nearest"))


@pytest.fixture(scope="module")
def autoencoder():
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.3, shift_factor=0.1,
    )  # fmt: skip


def test_decoded_losses_are_those_of_the_images(autoencoder):
    x, y = pair(3, 4, 8, 8)
    autoencoder.requires_grad_(False).eval()

    def reference(x, y):
        images = [autoencoder.decode(z / 0.3 + 0.1).sample for z in (x, y)]
        return (images[0] - images[1]).abs().flatten(1).mean(1)

    wanted, peaks = value_and_gradient(reference, x, y), {}
    for chunk in (1, 2, 3):
        with ByteTracker() as bytes:
            got = value_and_gradient(decoded(distillation_loss("l1"), VAE(autoencoder), chunk=chunk), x, y)
        peaks[chunk] = bytes.peak
        assert relative(got[0], wanted[0]) < 1e-5 and relative(got[1], wanted[1]) < 1e-5
    with ByteTracker() as bytes:
        value_and_gradient(reference, x, y)
    assert peaks[1] < 0.45 * peaks[3] and peaks[3] < 0.75 * bytes.peak


def test_decoded_lpips_keeps_pixels_and_features(random_weights, autoencoder):
    x, y = pair(2, 4, 8, 8)
    loss = decoded(distillation_loss("lpips-alex", cache=2**28), VAE(autoencoder))
    images = [loss.measure.images(z) for z in (x, y)]
    wanted = distillation_loss("lpips-alex")(*images)
    assert torch.allclose(loss(x, y, [3, 4]), wanted, rtol=1e-4)
    assert torch.allclose(loss(x, y, [3, 4]), wanted, rtol=1e-4) and loss.cache.hits == 2
    assert loss.weight_bytes > sum(p.nbytes for p in autoencoder.parameters())


@pytest.mark.parametrize(("tile", "shape"), [(4, (12, 8)), (5, (12, 7)), (16, (8, 8))])
def test_tiles_of_convolutions_are_exact(tile, shape):
    """An overlap of the decoder's reach: values and gradients of the whole, with any remainder."""
    x, y = pair(3, 4, *shape, dtype=torch.float64)
    whole = value_and_gradient(decoded(distillation_loss("huber"), Upscale()), x, y)
    tiled = value_and_gradient(decoded(distillation_loss("huber"), Upscale(), chunk=2, tile=tile, overlap=3), x, y)
    assert relative(tiled[0], whole[0]) < 1e-13 and relative(tiled[1], whole[1]) < 1e-13


def test_tiles_take_less_and_are_near_the_whole(autoencoder):
    """A real decoder's tiles see one part at a time: less memory, another value; identical samples are at zero."""
    x, y = pair(1, 4, 32, 32)
    y = x + 0.1 * y
    results, peaks = [], []
    for tile in (None, 8):
        loss = decoded(distillation_loss("l1", cache=2**20), VAE(autoencoder), tile=tile, overlap=4)
        with ByteTracker() as bytes:
            results.append(value_and_gradient(loss, x, y))
        peaks.append(bytes.peak)
        assert float(loss(x, x)) == 0
        first = loss(x, y, [5])
        assert torch.equal(loss(x, y, [5]), first) and loss.cache.hits == (1 if tile is None else 16)
    assert peaks[1] < 0.5 * peaks[0]
    assert float(results[1][0]) == pytest.approx(float(results[0][0]), rel=0.25)
    assert float(F.cosine_similarity(results[0][1].flatten(), results[1][1].flatten(), 0)) > 0.8


def test_bad_decoders_are_refused():
    loss = distillation_loss("l1")
    with pytest.raises(ValueError, match="requires_grad_"):
        decoded(loss, nn.Conv2d(4, 3, 1))
    with pytest.raises(ValueError, match="tile must be at least 1"):
        decoded(loss, Upscale(), tile=0)
    shrinking = nn.Conv2d(4, 3, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="whole number of pixels"):
        decoded(loss, shrinking, tile=4)(*pair(1, 4, 8, 8))


def test_names():
    assert set(NETWORKS) < set(LOSSES)
    assert isinstance(distillation_loss("lpips-alex", trained=False).measure, Perceptual)
