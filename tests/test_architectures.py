"""Published networks as data: their sizes without their weights, and small ones that run."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from gas_engine import rollout
from gas_engine.architectures import ARCHITECTURES, PackedTransformer, architecture, network_label
from gas_engine.memory import lean
from gas_engine.solvers import classical, grid

# As published, in millions: papers, model cards, files.
PARAMETERS = {
    "cifar10": 55.7, "ffhq64": 61.8, "adm64": 295.9, "ldm4": 401.4, "dit-xl2": 674.8, "sd15": 859.5, "sdxl": 2567.5,
    "sd3": 2028.3, "flux": 11901.4,
}  # fmt: skip
EDM = ("cifar10", "ffhq64", "adm64")


def needs(name: str) -> None:
    if name not in EDM:
        pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_at_full_size(name: str) -> None:
    needs(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = architecture(name).denoiser()
    assert round(sum(p.numel() for p in denoiser.parameters()) / 1e6, 1) == PARAMETERS[name]
    assert denoiser.shape == ARCHITECTURES[name].shape and not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_small_ones_run_with_gradients(name: str) -> None:
    """The same classes; gradients for the state and the time, each sample's own; lean views agree."""
    needs(name)
    torch.manual_seed(0)
    entry = architecture(name)
    denoiser = entry.denoiser(small=True)
    assert denoiser.shape == entry.small_shape
    x, cond = torch.randn(3, *entry.small_shape, requires_grad=True), entry.cond(3, small=True)
    assert all(len(leaf) == 3 for leaf in tree_leaves(cond) if leaf is not None)
    t = torch.tensor(0.4567, dtype=torch.float64, requires_grad=True)
    y = denoiser(x, t, cond)
    assert y.shape == x.shape and y.isfinite().all()
    grads = torch.autograd.grad(y[0].square().sum(), (x, t), retain_graph=True)
    assert grads[0][0].abs().max() > 0 and grads[0][1:].abs().max() == 0 and grads[1].abs() > 0
    torch.testing.assert_close(lean(denoiser)(x, t, cond), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ldm4", "sd15", "sd3", "flux"])
def test_time_labels_keep_their_fraction(name: str) -> None:
    """The derivative in t is the slope between two times that round to the same integer label."""
    needs(name)
    torch.manual_seed(0)
    entry = architecture(name)
    denoiser = entry.denoiser(small=True).double()
    x = torch.randn(1, *entry.small_shape, dtype=torch.float64)
    cond = entry.cond(1, small=True)
    t = torch.tensor(0.62345, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(denoiser(x, t, cond).sum(), t)
    h = 1e-4
    assert int(network_label(entry.schedule, t - h)) == int(network_label(entry.schedule, t + h))
    with torch.no_grad():
        difference = (denoiser(x, t + h, cond) - denoiser(x, t - h, cond)).sum() / (2 * h)
    # diffusers rounds labels to float32 before the sines.
    torch.testing.assert_close(slope, difference, rtol=2e-3, atol=1e-3)


def test_labels_of_the_training_times() -> None:
    labels = network_label(architecture("sd15").schedule, torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(labels, torch.tensor([0.0, 499.0, 999.0], dtype=torch.float64))
    flow = architecture("sd3").schedule
    assert float(network_label(flow, torch.tensor(0.5, dtype=torch.float64))) == 1000 * float(flow.sigma(0.5)) == 750


def test_flux_packs_patches_as_its_pipeline_does() -> None:
    """A network that returns its tokens gives the picture back; a token holds 2 x 2 pixels, channels first."""

    class Echo(nn.Module):
        dtype = torch.float32

        def __init__(self):
            super().__init__()
            self.time_text_embed = nn.Identity()

        def forward(self, packed, text, pooled, label, image_ids, text_ids, guidance, return_dict):
            self.seen = packed, image_ids, label
            return (packed,)

    function = PackedTransformer(Echo(), architecture("flux").schedule)
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    cond = {"text": torch.zeros(2, 5, 8), "pooled": torch.zeros(2, 8)}
    torch.testing.assert_close(function(x, torch.tensor(1.0, dtype=torch.float64), cond), x)
    tokens, places, label = function.network.seen
    assert tokens.shape == (2, 6, 12) and label.tolist() == [1.0, 1.0]
    assert torch.equal(tokens[1, 4], x[1, :, 2:4, 2:4].flatten())
    assert places[4].tolist() == [0, 1, 1] and places[-1].tolist() == [0, 1, 2]


def test_a_small_network_samples_in_bfloat16() -> None:
    needs("sd3")
    entry = architecture("sd3")
    denoiser = entry.denoiser(small=True).to(torch.bfloat16)
    tableau = classical.ddim(entry.schedule, grid("uniform", entry.schedule, 2, 1e-3))
    x = rollout(denoiser, torch.randn(2, *entry.small_shape), tableau, entry.cond(2, small=True))
    assert x.dtype == torch.float32 and x.isfinite().all()


def test_guided_networks_know_what_says_nothing() -> None:
    assert architecture("ldm4").null_cond(2).tolist() == [1000, 1000]
    null, cond = (make(2, small=True) for make in (architecture("sd15").null_cond, architecture("sd15").cond))
    assert null["text"].shape == cond["text"].shape and not null["text"].any()
    assert architecture("flux").null_cond(2) is None and "guidance" in architecture("flux").cond(2, small=True)


def test_clear_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown architecture 'sd2'; known: cifar10"):
        architecture("sd2")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="pip install diffusers"):
        architecture("sd15").denoiser(small=True)
