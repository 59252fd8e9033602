"""Adversarial losses: reference numbers, joint double backward, kinds, conditions, refusals, bytes."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from twin import relative

from gas_engine.losses import adversarial, discriminator_loss, generator_loss
from gas_engine.memory import ByteTracker
from gas_engine.networks import R3GANDiscriminator, discriminator_for

EXACT = ["piecewise", "forward_over_reverse", "double_backward"]
WANTED = arrays("disc_f64")
PAIRINGS = {
    "relativistic": lambda a, b: F.softplus(b - a),
    "non_saturating": lambda a, b: F.softplus(-a) + F.softplus(b),
    "plain": lambda a, b: F.softplus(-a) + F.softplus(b),
}


def published():
    arguments = json.loads((GOLDEN / "small_disc_ctor.json").read_text())
    return R3GANDiscriminator.from_published(arguments["kwargs"], arrays("small_disc_state")).double()


def drawn(D, std=0.3):
    for p in D.parameters():
        nn.init.normal_(p, std=std)
    return D.double()


def images(*shape):
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def joint(D, real, fake, cond=None, gamma=0.2, kind="relativistic"):
    """Gradients by autograd through the gradient, both sides in one graph."""
    real, fake = real.clone().requires_grad_(), fake.clone().requires_grad_()
    args = () if cond is None else (cond,)
    a, b = D(real, *args), D(fake, *args)
    loss = PAIRINGS[kind](a, b)
    for x, logits in ((real, a), (fake, b)):
        loss = loss + gamma / 2 * torch.autograd.grad(logits.sum(), x, create_graph=True)[0].square().sum((1, 2, 3))
    names, weights = zip(*D.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss.mean(), weights), strict=True))


def gradients(D):
    return {name: p.grad for name, p in D.named_parameters()}


def assert_same(D, wanted, tolerance=1e-12):
    for name, grad in gradients(D).items():
        assert relative(grad, wanted[name]) < tolerance, name


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("method", EXACT)
def test_discriminator_matches_reference(method, micro_batch):
    D = published()
    losses = discriminator_loss(D, WANTED["real"], WANTED["fake"], method=method, micro_batch=micro_batch)
    for got, name in (
        (losses.loss, "d_loss_per_sample"), (losses.adversarial, "d_adv"), (losses.relativistic, "d_rel"),
        (losses.r1, "d_r1"), (losses.r2, "d_r2"),
        (losses.real_logits, "logits_real"), (losses.fake_logits, "logits_fake"),
    ):  # fmt: skip
        assert not got.requires_grad and relative(got, WANTED[name]) < 1e-12
    assert_same(D, {name[6:]: value for name, value in WANTED.items() if name.startswith("dgrad/")})


@pytest.mark.parametrize("given_as", ["real", "logits_real"])
def test_generator_matches_reference(given_as):
    D, fake = published(), WANTED["fake"].clone().requires_grad_()
    loss = generator_loss(D, fake, WANTED[given_as])
    assert relative(loss, WANTED["g_loss_per_sample"]) < 1e-12
    loss.mean().backward()
    assert relative(fake.grad, WANTED["g_grad_fake"]) < 1e-12
    assert all(p.grad is None and p.requires_grad for p in D.parameters())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([3, 4, 1]), st.sampled_from([None, 2]), st.integers(1, 4), st.integers(1, 4),
    st.sampled_from(sorted(PAIRINGS)), st.sampled_from([0.2, 30.0]), st.integers(0, 2), st.integers(1, 3),
)  # fmt: skip
def test_piecewise_is_joint_double_backward(stages, channels, classes, batch, micro, kind, gamma, blocks, expansion):
    torch.manual_seed(stages + 10 * batch)
    widths = [4, 8, 8][:stages]
    D = drawn(R3GANDiscriminator(widths, [2] * stages, [blocks] * stages, expansion, channels, classes))
    real, fake = images(batch, channels, D.size, D.size)
    cond = None if classes is None else torch.arange(batch) % classes
    loss, wanted = joint(D, real, fake, cond, gamma, kind)
    got = discriminator_loss(D, real, fake, cond, gamma, "piecewise", kind, micro)
    assert relative(got.loss, loss) < 1e-12
    assert_same(D, wanted)


def test_piecewise_takes_any_network_of_linear_pieces():
    inner = nn.Sequential(nn.Conv2d(6, 6, 3, groups=2), nn.ReLU())
    outer = [nn.Flatten(), nn.Linear(24, 5), nn.LeakyReLU(), nn.Linear(5, 1), nn.Flatten(0)]
    D = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.LeakyReLU(0.1), inner, nn.Identity(), *outer)
    D = drawn(D)
    for method in EXACT:
        for micro_batch in (None, 1, 2):
            real, fake = images(3, 4, 8, 8)
            D.zero_grad()
            _, wanted = joint(D, real, fake)
            discriminator_loss(D, real, fake, method=method, micro_batch=micro_batch)
            assert_same(D, wanted)


class Norm(nn.Sequential):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    ("module", "seen"),
    [
        (nn.SiLU(), r"D\.1 is a SiLU"),
        (nn.GroupNorm(2, 4), r"D\.1 is a GroupNorm"),
        (nn.Sequential(nn.Identity(), nn.Tanh()), r"D\.1\.1 is a Tanh"),
        (Norm(nn.Identity()), r"D\.1 is a Norm"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), r"D\.1 is a Conv2d"),
        (nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)), r"D\.1 is a Conv2d with hooks"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), r"D\.1 is a ParametrizedConv2d"),
    ],
)
def test_piecewise_refuses_what_is_not_piecewise_linear(module, seen):
    D = nn.Sequential(nn.Conv2d(3, 4, 1), module, nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0)).double()
    real, fake = images(2, 3, 4, 4)
    with pytest.raises(ValueError, match=f"{seen}.*double_backward"):
        discriminator_loss(D, real, fake)
    assert all(p.grad is None for p in D.parameters())


@pytest.mark.parametrize("method", ["double_backward", "forward_over_reverse"])
def test_smooth_networks_by_the_other_methods(method):
    D = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    D, (real, fake) = drawn(D), images(3, 3, 4, 4)
    _, wanted = joint(D, real, fake)
    discriminator_loss(D, real, fake, method=method, micro_batch=2)
    assert_same(D, wanted)


@pytest.mark.parametrize("method", EXACT)
def test_gradients_are_added_and_frozen_weights_stay_without(method):
    D, (real, fake) = drawn(discriminator_for((3, 8, 8))), images(2, 3, 8, 8)
    D.ExtractionLayer.requires_grad_(False)
    discriminator_loss(D, real, fake, method=method)
    once = {name: None if g is None else g.clone() for name, g in gradients(D).items()}
    discriminator_loss(D, real, fake, method=method)
    assert D.ExtractionLayer.Layer.weight.grad is None
    assert all(g is None or relative(g, 2 * once[name]) < 1e-12 for name, g in gradients(D).items())


@pytest.mark.parametrize("method", [*EXACT, "random_direction"])
def test_without_gamma_there_is_no_penalty(method):
    D, (real, fake) = drawn(discriminator_for((3, 8, 8))), images(3, 3, 8, 8)
    losses = discriminator_loss(D, real.requires_grad_(), fake, gamma=0.0, method=method, micro_batch=2)
    assert torch.equal(losses.r1, torch.zeros(3).double()) and torch.equal(losses.loss, losses.adversarial)
    assert_same(D, joint(D, real.detach(), fake, gamma=0.0)[1])
    assert real.grad is None


def test_saturated_logits_stay_finite():
    """A discriminator that is sure: the pairing's derivative underflows, the penalty's does not."""
    D, (real, fake) = drawn(discriminator_for((3, 8, 8)), std=1.0).float(), images(2, 3, 8, 8)
    discriminator_loss(D, real.float(), fake.float())
    got = gradients(D)
    assert float(discriminator_loss(D, real.float(), fake.float()).relativistic.abs().max()) > 100
    assert all(bool(g.isfinite().all()) for g in got.values())


def test_float32_is_near_float64():
    D, (real, fake) = drawn(discriminator_for((3, 8, 8))), images(4, 3, 8, 8)
    _, wanted = joint(D, real, fake)
    discriminator_loss(D.float(), real.float(), fake.float())
    assert_same(D, wanted, 1e-4)


def test_bfloat16_images_and_float32_weights():
    D, (real, fake) = drawn(discriminator_for((3, 8, 8)), 0.1), images(4, 3, 8, 8)
    _, wanted = joint(D, real, fake)
    errors = {}
    for method in ("piecewise", "double_backward"):
        D.float().zero_grad()
        losses = discriminator_loss(D, real.bfloat16(), fake.bfloat16(), method=method, micro_batch=2)
        assert losses.loss.dtype == torch.float32
        errors[method] = max(relative(g, wanted[name]) for name, g in gradients(D).items())
    assert all(g.dtype == torch.float32 for g in gradients(D).values())
    # Signs flip where rounding crosses a kink, in any method: the two are about as far from float64.
    assert errors["piecewise"] < 2 * errors["double_backward"] < 0.6


def test_the_same_bits_every_time():
    D, (real, fake) = drawn(discriminator_for((3, 16, 16))).float(), images(3, 3, 16, 16)
    runs = []
    for _ in range(2):
        D.zero_grad()
        discriminator_loss(D, real.float(), fake.float(), micro_batch=2)
        runs.append(gradients(D))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("kind", sorted(PAIRINGS))
def test_generator_losses(kind):
    D, (real, fake) = drawn(discriminator_for((2, 4, 4), 3)), images(3, 2, 4, 4)
    drawn(D, 0.1)
    cond, fake = torch.tensor([0, 2, 1]), fake.requires_grad_()
    a, b = D(real, cond).detach(), D(fake, cond)
    wanted = {
        "relativistic": -F.logsigmoid(b - a), "non_saturating": -F.logsigmoid(b), "plain": torch.log(1 - b.sigmoid())
    }[kind]  # fmt: skip
    loss = generator_loss(D, fake, a, cond, kind)
    assert relative(loss, wanted) < 1e-9
    grad, expected = (torch.autograd.grad(value.sum(), fake)[0] for value in (loss, wanted))
    assert relative(grad, expected) < 1e-9


def test_the_approximation_says_what_it_is_and_is_right_on_average():
    """For D(x) = <v, x> the estimate is <v, e>^2, whose mean is |v|^2."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False), nn.Flatten(0)).double()
    real, fake = images(4000, 3, 2, 2)
    with pytest.warns(UserWarning, match="one random direction"):
        losses = discriminator_loss(D, real, fake, method="random_direction")
    assert float(losses.r1.mean()) == pytest.approx(float(D[1].weight.detach().square().sum()), rel=0.15)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        discriminator_loss(D, real, fake)


def test_the_cache_decides_how_many_pairs():
    """64 x 64: pairs of one; a toy: all at once."""
    with torch.device("meta"):
        large, small = discriminator_for((3, 64, 64)), discriminator_for((1, 8, 8))
    assert adversarial.fitting(large, torch.zeros(8, 3, 64, 64)) == 1
    assert adversarial.fitting(small, torch.zeros(24, 1, 8, 8)) >= 24


def test_bytes_of_the_methods():
    """Above the weights, gradients included, of a network that is nearly all activations: pairs of one below an eighth
    of joint double backward (which here has the lean activations too), four at once below a quarter."""
    D = drawn(R3GANDiscriminator([16, 16, 16, 16], [4] * 4, [2] * 4), 0.1)
    real, fake = images(8, 3, 32, 32)

    def peak(run, **options):
        D.zero_grad()
        with ByteTracker() as bytes:
            run(D, real, fake, **options)
        return bytes.peak

    whole = peak(joint)
    assert peak(discriminator_loss, method="double_backward") < 0.6 * whole
    assert peak(discriminator_loss, micro_batch=4) < whole / 4
    assert peak(discriminator_loss, micro_batch=1) < whole / 8


def test_bad_input_names_the_value():
    D, (real, fake) = discriminator_for((3, 4, 4)), images(2, 3, 4, 4)
    for arguments, seen in (
        ({"method": "exact"}, "unknown method .* 'exact'; known: piecewise"),
        ({"kind": "wasserstein"}, "unknown kind .* 'wasserstein'; known: relativistic"),
        ({"gamma": -1.0}, r"gamma must be zero or more, got -1\.0"),
        ({"gamma": float("nan")}, "gamma must be zero or more, got nan"),
        ({"micro_batch": 0}, "micro_batch must be one pair or more, got 0"),
    ):
        with pytest.raises(ValueError, match=seen):
            discriminator_loss(D, real, fake, **arguments)
    with pytest.raises(ValueError, match=r"got \[2, 3, 4, 4\] and \[1, 3, 4, 4\]"):
        discriminator_loss(D, real, fake[:1])
    with pytest.raises(ValueError, match=r"got \[3\]"):
        generator_loss(D, fake, torch.zeros(3))
    with pytest.raises(ValueError, match=r"takes \[B, 3, 4, 4\], got \[2, 3, 8, 8\]"):
        discriminator_loss(D, *images(2, 3, 8, 8))
    along_rows = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Linear(4, 1), nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"\[B, C\] alone, got \[2, 1, 4, 4\]"):
        discriminator_loss(along_rows.double(), real, fake)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 1)).double()
    for method in EXACT:
        with pytest.raises(ValueError, match=r"one logit a sample, \[2\], got \[2, 1\]"):
            discriminator_loss(flat, real, fake, method=method)
