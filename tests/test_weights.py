"""Weights that are streamed, or held in eight or four bits: outputs, gradients, bytes, and the original left alone."""

from __future__ import annotations

import builtins
import copy

import pipelines
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from twin import relative

from gas_engine.memory import ByteTracker, checkpoint_blocks, lean, quantisable, quantize_weights, stream_weights
from gas_engine.memory._nf4 import NF4
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
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.03), ("nf4", 0.3)])
def test_packed_weights(kind, error, dtype):
    """Close to the network, and lean keeps no dequantised weight: the graph is that of the original."""
    if kind == "int8":
        pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    original, x = network().to(dtype), torch.randn(4, 16, dtype=dtype)
    pointers = [p.data_ptr() for p in original.parameters()]
    wanted = gradient(original, x)
    held = quantize_weights(original, kind=kind)
    for model in (held, lean(held), checkpoint_blocks(lean(held))):
        y, g = gradient(model, x)
        assert relative(y, wanted[0]) < error and relative(g, wanted[1]) < error
    assert [p.data_ptr() for p in original.parameters()] == pointers
    assert all(type(m.weight) is nn.Parameter for m in original.modules() if isinstance(m, nn.Linear))

    def kept(model: nn.Module) -> int:
        leaf = x.clone().requires_grad_()
        with ByteTracker() as bytes:
            y = model(leaf)
            return bytes.live - y.nbytes

    weights = sum(m.weight.nbytes for m in quantisable(original))
    assert kept(lean(held)) <= kept(lean(original))
    assert kept(held) > 0.9 * weights if kind == "int8" else kept(held) <= kept(original)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(["normal", "zero", "equal"]),
)
def test_four_bits_of_any_weight(shape, dtype, values):
    """No further than half of the widest gap, for any size; zeros and extremes are exact."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = weight if values == "normal" else torch.full_like(weight, 0.0 if values == "zero" else -0.5)
    packed = NF4.of(weight)
    numbers = -(-weight.numel() // 64) * 64
    assert (packed.codes.nbytes, packed.scales.nbytes) == (numbers // 2, numbers // 16)
    found = packed.dequantize()
    assert found.shape == weight.shape == packed.shape and found.dtype == dtype == packed.dtype
    if values != "normal":
        assert torch.equal(found, weight)
    blocks = nn.functional.pad((found - weight).flatten(), (0, numbers - weight.numel())).view(-1, 64).abs().amax(1)
    assert (blocks <= (0.153 if dtype != torch.bfloat16 else 0.157) * packed.scales).all()


def test_four_bits_of_others():
    """torchao writes the same values with four digits, and scales in eight bits."""
    reason = "needs torchao: pip install torchao"
    NF4Tensor = pytest.importorskip("torchao.quantization", reason=reason).NF4Tensor
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    theirs, ours = NF4Tensor.from_tensor(weight, 64, 256), NF4.of(weight)
    assert (theirs.quantized_data != ours.codes).float().mean() < 1e-3
    assert relative(ours.dequantize(), theirs.get_original_weight()) < 0.005
    assert 0.08 < relative(ours.dequantize(), weight) < 0.1


def told(name: str, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """A small network of diffusers at a state and a time."""
    batch, width = len(x), pipelines.WIDTH
    text, pooled = torch.linspace(-1, 1, batch * 5 * width).view(batch, 5, width), torch.ones(batch, width)
    t = t.expand(batch)
    if name == "sdxl":
        text, added = torch.cat([text, text], 2), {"text_embeds": pooled, "time_ids": torch.full((batch, 6), 16.0)}
        return network(x, t, text, added_cond_kwargs=added).sample
    if name == "sd3":
        return network(x, torch.cat([text, text], 2), torch.cat([pooled, pooled], 1), t).sample
    if name == "flux":
        tokens = x.reshape(batch, 16, 16)
        ids = {"img_ids": torch.arange(48.0).view(16, 3), "txt_ids": torch.zeros(5, 3)}
        return network(tokens, text, pooled, t / 1000, guidance=torch.full((batch,), 3.5), **ids).sample
    if name == "dit":
        return network(x, t, class_labels=torch.arange(batch)).sample
    return network(x, encoder_hidden_states=text, timestep=t).sample


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "dit", "pixart"])
def test_packed_weights_of_diffusers(name, kind):
    """The error of the output is stated; gradients of state and time are those of the dequantised network."""
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    pipeline = pipelines.build(name)
    original = (getattr(pipeline, "unet", None) or pipeline.transformer).requires_grad_(False)
    layers = quantisable(original)
    with ByteTracker() as bytes:
        held = quantize_weights(original, kind=kind)
        packed = bytes.live
    if kind == "nf4":
        assert packed == sum(36 * -(-layer.weight.numel() // 64) for layer in layers)
    else:
        numbers = sum(layer.weight.numel() + 4 * len(layer.weight) for layer in layers)
        assert numbers <= packed <= numbers + 8 * sum(len(layer.weight) for layer in layers)
    packed_names = {n for n, p in held.named_parameters() if hasattr(type(p), "__tensor_flatten__")}
    assert len(packed_names) == len(layers) > 0 and not any("emb" in n for n in packed_names)
    assert type(held.get_parameter(next(n for n, _ in held.named_parameters() if "emb" in n))) is nn.Parameter

    plain = copy.deepcopy(original)
    for n in packed_names:
        plain.get_parameter(n).data = held.get_parameter(n).dequantize()
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(421.7)

    def run(network: nn.Module) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), t.clone().requires_grad_()]
        y = told(name, network, *leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    wanted, exact = run(original), run(plain)
    assert relative(exact[0], wanted[0]) < {"int8": 0.02, "nf4": 0.2}[kind]
    for model in (held, lean(held), checkpoint_blocks(lean(held))):
        for value, same in zip(run(model), exact, strict=True):
            assert relative(value, same) < 1e-4


def test_torchao_is_asked_for_in_one_sentence(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"int8 weights need torchao .* pip install torchao"):
        quantize_weights(network())
