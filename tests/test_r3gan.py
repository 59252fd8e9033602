"""The R3GAN discriminator: published names, shapes and outputs; initial statistics; what it keeps; what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, arrays
from torch import nn
from twin import relative

from gas_engine.memory import ByteTracker
from gas_engine.networks import R3GANDiscriminator, discriminator_for
from gas_engine.ops import _native

PUBLISHED = json.loads((GOLDEN / "small_disc_ctor.json").read_text())


def published():
    return R3GANDiscriminator.from_published(PUBLISHED["kwargs"], arrays("small_disc_state"))


def alive(D):
    """With every weight drawn: the published initial ones leave out all the blocks."""
    for p in D.parameters():
        nn.init.normal_(p, std=0.3)
    return D


def plain(D, x):
    """The network from PyTorch's own layers, by tensor name."""
    p = dict(D.named_parameters()) | dict(D.named_buffers())
    x = F.conv2d(x, p["ExtractionLayer.Layer.weight"])
    for i, stage in enumerate(D.MainLayers):
        for j in range(len(stage.Layers)):
            name = f"MainLayers.{i}.Layers.{j}."
            if name + "NonLinearity1.Bias" in p:
                h = F.conv2d(x, p[name + "LinearLayer1.Layer.weight"])
                h = F.leaky_relu(h + p[name + "NonLinearity1.Bias"][:, None, None], 0.2)
                weight = p[name + "LinearLayer2.Layer.weight"]
                h = F.conv2d(h, weight, padding=1, groups=weight.shape[0] // weight.shape[1])
                h = F.leaky_relu(h + p[name + "NonLinearity2.Bias"][:, None, None], 0.2)
                x = x + F.conv2d(h, p[name + "LinearLayer3.Layer.weight"])
            elif name + "Basis.weight" in p:
                x = F.conv2d(x, p[name + "Basis.weight"], groups=x.shape[1]).flatten(1)
                x = F.linear(x, p[name + "LinearLayer.weight"])
            else:
                kernel = p[name + "Resampler.Kernel"].expand(x.shape[1], 1, 4, 4)
                x = F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])
                if name + "LinearLayer.Layer.weight" in p:
                    x = F.conv2d(x, p[name + "LinearLayer.Layer.weight"])
    return x


def test_every_tensor_has_its_published_name_and_shape():
    D = published()
    assert sorted([n, list(p.shape)] for n, p in D.named_parameters()) == PUBLISHED["params"]
    assert sorted([n, list(b.shape)] for n, b in D.named_buffers()) == PUBLISHED["buffers"]


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_match_reference(frozen):
    D, wanted = published().requires_grad_(not frozen), arrays("disc_f64")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for side in ("real", "fake"):
            logits = D(wanted[side].to(dtype))
            assert logits.dtype == dtype and relative(logits, wanted[f"logits_{side}"]) < tolerance


def test_stages_are_read_from_shapes_and_names_from_behind_a_prefix():
    state = {f"Model.{name}": value for name, value in arrays("small_disc_state").items()}
    D, x = R3GANDiscriminator.from_published(None, {**state, "Step": torch.tensor(3)}), arrays("disc_f64")["real"]
    assert torch.equal(D(x), published()(x))


def test_another_filter_is_taken_from_the_weights():
    taps = (1.0, 2.0, 1.0)
    D = alive(R3GANDiscriminator([8, 16], [2, 4], [1, 1], resample_filter=taps))
    loaded, x = R3GANDiscriminator.from_published(None, D.state_dict()), torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), D(x))
    with pytest.raises(ValueError, match=r"Resampler\.Kernel is not the filter"):
        R3GANDiscriminator([8, 16], [2, 4], [1, 1]).load_published(D.state_dict())


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8), (4, 16, 16), (7, 8, 8)])
@pytest.mark.parametrize("classes", [None, 3])
def test_any_size_against_plain_layers(shape, classes):
    D = alive(discriminator_for(shape, classes)).double()
    x, cond = torch.randn(2, *shape, dtype=torch.float64), torch.tensor([2, 0])
    features = plain(D, x)
    wanted = features.sum(1) if classes is None else (features * D.EmbeddingLayer.weight.T[cond]).sum(1)
    assert relative(D(x, cond), wanted) < 1e-12
    if classes:
        assert torch.equal(D(x, cond), D(x, F.one_hot(cond, 3).float()))


def test_default_sizes():
    """22.4 M parameters for 64 x 64 (arXiv 2510.17699, appendix)."""
    with torch.device("meta"):
        for size, count in ((64, 22.4e6), (32, 20.7e6)):
            D = discriminator_for((3, size, size))
            assert sum(p.numel() for p in D.parameters()) == pytest.approx(count, rel=5e-3)
        assert discriminator_for((3, 256, 256)).size == 256


def test_initial_statistics():
    """N(0, gain / sqrt(fan_in)), biases and third convolutions zero (arXiv 2501.05441, section 4)."""
    torch.manual_seed(0)
    D = R3GANDiscriminator([64, 64], [4, 4], [2, 1])
    gain = math.sqrt(2 / 1.04) * 3**-0.25
    for name, p in D.named_parameters():
        fan_in = p[0].numel()
        wanted = gain / math.sqrt(fan_in) if "LinearLayer1" in name or "LinearLayer2" in name else 1 / math.sqrt(fan_in)
        if "LinearLayer3" in name or "Bias" in name:
            wanted = 0.0
        assert float(p.detach().std()) == pytest.approx(wanted, rel=0.4 if p.numel() < 500 else 0.05), name


@pytest.mark.skipif(_native.native is None, reason="the native core is off: the twin of the activation keeps more")
def test_frozen_keeps_bits_alone():
    """A bit for each activation: four of 2 x 32 channels at 16 x 16 and 8 x 8, one block a stage."""
    D = alive(R3GANDiscriminator([32, 32, 32], [4, 4, 4], [1, 1, 1])).requires_grad_(False)
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    D(x)
    with ByteTracker() as bytes:
        logits = D(x)
        kept = bytes.live - logits.nbytes
    bits = sum(4 * 2 * 64 * size**2 // 8 for size in (16, 8, 4))
    # The sum of one feature keeps nothing, the linear map and the flattened input of one number a channel little.
    assert bits <= kept <= bits + 4 * 32 * 4
    wanted = torch.autograd.grad(plain(D, x).sum(), x)[0]
    assert relative(torch.autograd.grad(logits.sum(), x)[0], wanted) < 1e-5


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: R3GANDiscriminator([8, 8], [2], [1, 1]), "got 2, 1 and 2 numbers"),
        (lambda: R3GANDiscriminator([8], [3], [1]), "cardinality 3 does not divide 2 x width 8"),
        (lambda: discriminator_for((3, 48, 48)), r"no discriminator for states of shape \[3, 48, 48\].*4, 8, 16"),
        (lambda: discriminator_for((3, 64, 32)), r"\[3, 64, 32\]"),
        (
            lambda: discriminator_for((1, 8, 8))(torch.zeros(2, 1, 16, 16)),
            r"takes \[B, 1, 8, 8\], got \[2, 1, 16, 16\]",
        ),
        (lambda: discriminator_for((1, 4, 4), 5)(torch.zeros(2, 1, 4, 4)), "give the classes"),
        (lambda: discriminator_for((1, 4, 4), 5)(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4)), r"one-hot \[2, 5\]"),
        (lambda: R3GANDiscriminator.from_published({}, arrays("small_disc_state")), "WidthPerStage"),
        (lambda: R3GANDiscriminator.from_published(None, {"weight": torch.zeros(1)}), "none of 1 tensors"),
        (lambda: published().load_published({"ExtractionLayer.Layer.weight": torch.zeros(1)}), "Missing key"),
    ],
)
def test_bad_input_names_the_value(make, seen):
    with pytest.raises(ValueError, match=seen):
        make()
