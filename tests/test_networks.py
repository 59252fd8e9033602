"""EDM networks against reference outputs and gradients, and preconditioning against its table."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import GOLDEN, arrays
from safetensors.torch import load_file
from twin import relative

from gas_engine import EDMDenoiser, load_denoiser
from gas_engine.adapters.digits import ASSETS
from gas_engine.denoiser import seeded
from gas_engine.guidance import guided
from gas_engine.metrics.features import EMBEDDED
from gas_engine.networks import build_edm
from gas_engine.teacher import TeacherSolver, teacher_samples

SMALL = {
    "img_resolution": 8, "img_channels": 2, "model_type": "SongUNet", "model_channels": 16, "channel_mult": [1],
    "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip


def build(name):
    arguments = json.loads((GOLDEN / f"{name}_ctor.json").read_text())
    return build_edm(arguments["kwargs"], arrays(f"{name}_state"), arguments["cls"]), arguments


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("name", "file"), [("tiny_edm", "net"), ("ncsnpp", "ncsnpp"), ("adm", "adm")])
def test_networks_match_reference(name, file, frozen):
    """With trainable weights through PyTorch's own layers, with frozen ones through the fused ops."""
    network, _ = build(name)
    network.requires_grad_(not frozen)
    wanted, target = arrays(f"{file}_f64"), arrays("inputs")["target"].double()
    labels = wanted.get("labels")
    for i in range(5 if file == "net" else 3):
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            x = wanted[f"x{i}"].to(dtype).clone().requires_grad_()
            sigma = wanted[f"sigma{i}"].double().clone().requires_grad_()
            out = network(x, sigma, labels)
            loss = (out * target).sum() if file == "net" else out.sum() + out.square().sum()
            loss.backward()
            assert out.dtype == dtype and relative(out, wanted[f"D{i}"]) < tolerance
            assert relative(x.grad, wanted[f"gx{i}"]) < tolerance
            # In float32, at sigma 0.002, its derivative is a difference of numbers ten thousand times larger.
            loose = tolerance if dtype == torch.float64 else 1e-4 / min(1.0, float(sigma.detach()) ** 0.5)
            assert relative(sigma.grad, wanted[f"gsigma{i}"]) < loose


@pytest.mark.parametrize("name", ["tiny_edm", "ncsnpp", "adm"])
def test_every_tensor_has_its_published_name_and_shape(name):
    network, arguments = build(name)
    assert [[n, list(p.shape)] for n, p in network.named_parameters()] == arguments["named_parameters"]
    assert [[n, list(b.shape)] for n, b in network.named_buffers()] == arguments["named_buffers"]
    assert sum(p.numel() for p in network.parameters()) == arguments["n_params"]


def test_networks_come_frozen_and_in_eval_mode():
    network = build_edm(SMALL)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
def test_every_encoder_and_decoder_runs(encoder, decoder):
    options = {**SMALL, "encoder_type": encoder, "decoder_type": decoder, "channel_mult": [1, 2, 2]}
    network = build_edm({**options, "resample_filter": [1, 3, 3, 1], "embedding_type": "fourier"})
    x = torch.randn(2, 2, 8, 8)
    assert network(x, torch.tensor([0.5, 2.0])).shape == x.shape


def test_published_sizes():
    """Parameter counts of the released CIFAR-10 and ImageNet-64 networks (arXiv 2206.00364, Table 7)."""
    with torch.device("meta"):
        cifar = build_edm(
            {
                "img_resolution": 32, "img_channels": 3, "model_type": "SongUNet", "augment_dim": 9,
                "channel_mult": [2, 2, 2],
            }
        )  # fmt: skip
        imagenet = build_edm({"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"})
    assert sum(p.numel() for p in cifar.parameters()) == pytest.approx(55.7e6, rel=2e-3)
    assert sum(p.numel() for p in imagenet.parameters()) == pytest.approx(295.9e6, rel=2e-3)


def test_vp_preconditioning():
    network = build_edm(SMALL, precond="VPPrecond")
    t = torch.tensor([1e-5, 0.01, 0.4, 1.0], dtype=torch.float64)
    sigma = torch.expm1(19.9 * t**2 / 2 + 0.1 * t).sqrt()
    c_skip, c_out, c_in, c_noise = network.coefficients(sigma)
    assert torch.allclose(c_noise, 999 * t, rtol=1e-10) and torch.equal(c_skip, torch.ones_like(t))
    assert torch.equal(c_out, -sigma) and torch.allclose(c_in, 1 / (1 + sigma**2).sqrt())
    assert network.sigma_min == pytest.approx(float(sigma[0]), rel=1e-12)
    assert network.sigma_max == pytest.approx(float(sigma[-1]), rel=1e-12)


def test_ve_preconditioning():
    network = build_edm(SMALL, precond="VEPrecond")
    sigma = torch.tensor([0.02, 100.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = network.coefficients(sigma)
    assert torch.equal(c_out, sigma) and torch.equal(c_in, c_skip) and float(c_noise[1]) == math.log(50)


def test_classes_are_indices_or_one_hot():
    network = build_edm({**SMALL, "label_dim": 4}).requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) / 8)
    denoiser, x, t = EDMDenoiser(network), torch.randn(3, 2, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    by_index = denoiser(x, t, torch.tensor([0, 3, 1]))
    one_hot = torch.nn.functional.one_hot(torch.tensor([0, 3, 1]), 4)
    assert torch.equal(by_index, denoiser(x, t, one_hot.float())) and denoiser.classes == 4
    assert not torch.equal(by_index, denoiser(x, t))
    assert denoiser.conditioning.null is None
    with pytest.raises(RuntimeError, match="must be smaller than num_classes"):
        denoiser(x, t, torch.tensor([0, 4, 1]))


def test_a_network_that_was_told_no_class_at_times_has_an_index_for_it():
    network = build_edm({**SMALL, "label_dim": 4, "label_dropout": 0.1}).requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) / 8)
    denoiser, x, t = EDMDenoiser(network), torch.randn(3, 2, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    found = denoiser(x, t, torch.tensor([0, 4, 1]))
    assert denoiser.conditioning.null.tolist() == [4] and denoiser.classes == 4
    assert relative(found[1], denoiser(x, t)[1]) < 1e-6 and relative(found[2], denoiser(x, t)[2]) > 1e-3


def test_guided_digits_are_those_asked_for():
    """By the classifier that comes with them: nearly all without guidance, and all with it."""
    plain = load_denoiser("digits-guided")
    classifier = EMBEDDED["digits-guided"].network().eval()
    classifier.load_state_dict(load_file(ASSETS / "features.safetensors"))
    classes, right = seeded(plain, range(128))[1], []
    for scale in (1.0, 4.0):
        samples = teacher_samples(guided(plain, scale, plain.conditioning.null), range(128), TeacherSolver(steps=10))
        with torch.no_grad():
            right.append(float((classifier(samples).argmax(1) == classes).float().mean()))
    assert 0.85 < right[0] < right[1] and right[1] > 0.99


@pytest.mark.parametrize(
    ("kwargs", "options", "seen"),
    [
        ({**SMALL, "model_type": "ViT"}, {}, "ViT"),
        ({**SMALL, "wings": 2}, {}, "wings"),
        ({**SMALL, "encoder_type": "odd"}, {}, "odd"),
        (SMALL, {"precond": "iDDPMPrecond"}, "iDDPMPrecond"),
        (SMALL, {"state_dict": {"model.extra": torch.zeros(1)}}, "model.extra"),
    ],
)
def test_bad_input_names_the_value(kwargs, options, seen):
    with pytest.raises(ValueError, match=seen):
        build_edm(kwargs, **options)
