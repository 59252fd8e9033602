"""Weights that are streamed, or held in eight bits: outputs, gradients, bytes, and the original left alone."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch import Tensor, nn
from twin import relative

from gas_engine.memory import ByteTracker, checkpoint_blocks, lean, quantize_weights, stream_weights
from gas_engine.networks import build_edm


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self, width: int = 256, depth: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, 16)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x * self.scale)
        for block in self.blocks:
            h = block(h)
        return self.last(h)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval().requires_grad_(False)


def gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    return y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]


def test_streamed_weights_come_and_go():
    original, x = network(), torch.randn(4, 16)
    before = {name: (v.data_ptr(), v.clone()) for name, v in original.state_dict().items()}
    small = checkpoint_blocks(stream_weights(original, "cpu"))
    wanted = gradient(original, x)
    block = sum(p.nbytes for p in original.blocks[0].parameters())
    with ByteTracker() as bytes:
        got = gradient(small, x)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert block <= bytes.by_phase["weights"] <= 2.01 * block and bytes.live < 0.1 * block
    for name, (pointer, value) in before.items():
        now = original.state_dict()[name]
        assert now.data_ptr() == pointer and torch.equal(now, value)
    with torch.no_grad(), ByteTracker() as bytes:
        assert torch.equal(small(x), wanted[0])
    assert bytes.peak < 1.3 * block


def test_streamed_views_of_views():
    """In any order with lean and blocks, on a real U-Net."""
    arguments = {
        "img_resolution": 16, "img_channels": 3, "model_type": "SongUNet", "model_channels": 32,
        "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8],
    }  # fmt: skip
    torch.manual_seed(0)
    unet, x = build_edm(arguments), torch.randn(2, 3, 16, 16)
    sigma = torch.tensor(0.7, dtype=torch.float64)
    wanted = gradient(lambda x: unet(x, sigma), x)
    for view in (
        stream_weights(unet, "cpu"),
        checkpoint_blocks(lean(stream_weights(unet, "cpu"))),
        checkpoint_blocks(stream_weights(lean(unet), "cpu")),
    ):
        for _ in range(2):
            got = gradient(lambda x, view=view: view(x, sigma), x)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_network_without_blocks_cannot_be_streamed():
    with pytest.raises(ValueError, match="no block was found in Linear"):
        stream_weights(nn.Linear(3, 3).requires_grad_(False), "cpu")
    with pytest.raises(ValueError, match=r"stream first: checkpoint_blocks\(stream_weights"):
        stream_weights(checkpoint_blocks(network()), "cpu")
    with pytest.raises(RuntimeError, match=r"'first.weight' is trainable.*requires_grad_\(False\)"):
        stream_weights(Network(), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_weights(dtype):
    """Close to the network, and lean keeps no dequantised weight: the graph is that of the original."""
    pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    original, x = network().to(dtype), torch.randn(4, 16, dtype=dtype)
    pointers = [p.data_ptr() for p in original.parameters()]
    wanted = gradient(original, x)
    held = quantize_weights(original)
    for model in (held, lean(held), checkpoint_blocks(lean(held))):
        y, g = gradient(model, x)
        assert relative(y, wanted[0]) < 0.03 and relative(g, wanted[1]) < 0.03
    assert [p.data_ptr() for p in original.parameters()] == pointers
    assert type(original.first.weight) is nn.Parameter

    def kept(model: nn.Module) -> int:
        leaf = x.clone().requires_grad_()
        with ByteTracker() as bytes:
            y = model(leaf)
            return bytes.live - y.nbytes

    weights = sum(m.weight.nbytes for m in original.modules() if isinstance(m, nn.Linear))
    assert kept(lean(held)) <= kept(lean(original)) and kept(held) > 0.9 * weights


def test_torchao_is_asked_for_in_one_sentence(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"int8 weights need torchao .* pip install torchao"):
        quantize_weights(network())
