"""lean networks: the same outputs and gradients, fewer bytes, shared weights, and words for what was left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from twin import relative

from gas_engine.memory import ByteTracker, lean
from gas_engine.networks import build_edm


class Block(nn.Module):
    """A residual block as most U-Nets write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.act = nn.SiLU()

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        h = self.norm2(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return x + self.conv2(F.silu(h))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.pool = nn.Conv2d(3, 8, 3, padding=1), Block(8), nn.AvgPool2d(2)
        self.norm, self.last = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.block(self.block(self.first(x), scale, shift), scale, shift)
        return self.last(self.norm(self.pool(h)))


def frozen() -> nn.Module:
    torch.manual_seed(0)
    network = Network().eval().requires_grad_(False)
    for p in network.parameters():
        p.normal_(0, 0.3)
    network.norm.running_mean.normal_()
    network.norm.running_var.uniform_(0.5, 2)
    return network


def run(network: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...], int]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    with ByteTracker() as bytes:
        y = network(*leaves)
    return y, torch.autograd.grad(y.square().sum(), leaves), bytes.live - y.nbytes


def test_same_numbers_fewer_bytes() -> None:
    network, inputs = frozen(), [torch.randn(2, 3, 16, 16), torch.randn(2, 8), torch.randn(2, 8)]
    before = {name: p.clone() for name, p in network.state_dict().items()}
    small = lean(network)
    y, grads, kept = run(small, inputs)
    want, want_grads, stock = run(network, inputs)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert kept < 0.4 * stock, (kept, stock)
    # The weights are shared, the original is what it was, and so is its graph.
    assert [p.data_ptr() for p in small.parameters()] == [p.data_ptr() for p in network.parameters()]
    assert all(torch.equal(p, before[name]) for name, p in network.state_dict().items())
    assert run(network, inputs)[2] == stock
    assert small.block is small._modules["block"]


def test_coverage_says_what_was_left() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 1), nn.MaxPool2d(2), nn.GroupNorm(1, 3))
    small = lean(network.requires_grad_(False))
    assert small.coverage == {"Conv2d": (1, 1), "MaxPool2d": (0, 1), "GroupNorm": (1, 0)}
    assert "MaxPool2d" in str(small.coverage)
    assert small.coverage.told == "Conv2d 1, GroupNorm 1; as they are: Conv2d 1, MaxPool2d 1"
    torch.testing.assert_close(small(torch.ones(1, 3, 4, 4)), network(torch.ones(1, 3, 4, 4)))


class Then(nn.Module):
    """A norm and what is done with it."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.use = nn.GroupNorm(2, 4), use
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.norm(x))


def test_a_norm_that_is_not_activated_runs_alone() -> None:
    x = torch.randn(2, 4, 6)
    want = F.group_norm(x, 2)
    for use in (
        lambda h: h.transpose(1, 2),
        lambda h: h + 1,
        lambda h: 2 * h,
        lambda h: torch.cat([h, h]),
        lambda h: h.reshape(2, -1) @ torch.ones(24, 3),
        lambda h: h.sum(),
        lambda h: h * torch.ones(6),
    ):
        torch.testing.assert_close(lean(Then(use))(x), use(want))
    assert lean(Then(lambda h: torch.tensor(h.shape)))(x).tolist() == [2, 4, 6]
    assert isinstance(lean(nn.GroupNorm(2, 4).requires_grad_(False))(x), Tensor)


def test_gelu_forms() -> None:
    x = torch.randn(2, 4, 6)
    for kind in ("none", "tanh"):
        got = lean(Then(lambda h, kind=kind: F.gelu(h, approximate=kind)))(x)
        torch.testing.assert_close(got, F.gelu(F.group_norm(x, 2), approximate=kind))


def test_relu_keeps_a_bit() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 3, 3, padding=1))
    inputs = [torch.randn(2, 3, 16, 16)]
    y, grads, kept = run(lean(network.requires_grad_(False)), inputs)
    want, want_grads, stock = run(network, inputs)
    assert torch.equal(y, want) and torch.equal(grads[0], want_grads[0])
    assert kept <= 2 * 16 * 16 * 16 / 8 and stock >= 2 * 16 * 16 * 16 * 4


def test_hooks_and_train_mode_are_respected() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
    seen = []
    network[0].register_forward_hook(lambda *args: seen.append(1))
    small, x = lean(network), torch.randn(2, 3, 5, 5)
    assert small.coverage["Conv2d"] == (0, 1)
    small.eval()
    assert network.training and not small.training
    torch.testing.assert_close(small(x), F.batch_norm(network[0](x), torch.zeros(4), torch.ones(4)))
    assert len(seen) == 2


def test_trainable_weights_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"'0.weight' is trainable.*requires_grad_\(False\)"):
        lean(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_diffusers_unet() -> None:
    """The real architecture of SD 1.5, small: same outputs and gradients for image and text."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    ).eval().requires_grad_(False)  # fmt: skip
    for explicit in (False, True):
        if explicit:
            network.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
        small = lean(network)
        assert small.coverage["GEGLU"][1] == 0 and small.coverage["Conv2d"][1] == 0
        assert small.coverage["Attention"][0 if explicit else 1] > 0

        def call(model: nn.Module) -> nn.Module:
            return lambda x, text: model(x, torch.tensor([431.3]), text).sample

        inputs = [torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)]
        y, grads, kept = run(call(small), inputs)
        want, want_grads, stock = run(call(network), inputs)
        assert relative(y, want) < 1e-6
        for got, expected in zip(grads, want_grads, strict=True):
            assert relative(got, expected) < 1e-5
        assert kept < (0.5 if explicit else 0.75) * stock, (kept, stock)


@pytest.mark.parametrize("options", [{"scale_qk": False}, {"qk_norm": "layer_norm"}, {"upcast_softmax": True}])
def test_attention_of_another_formula_stays(options) -> None:
    """Explicit attention that scaled_dot_product_attention would make another is left, and said to be."""
    processors = pytest.importorskip("diffusers.models.attention_processor", reason="needs diffusers")
    torch.manual_seed(0)
    network = processors.Attention(16, heads=2, dim_head=8, processor=processors.AttnProcessor(), **options)
    small, x = lean(network.requires_grad_(False)), torch.randn(2, 5, 16)
    assert small.coverage["Attention"] == (0, 1)
    assert torch.equal(small(x), network(x))


class Modulated(nn.Module):
    """AdaLN as DiT, SD 3 and FLUX write it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.out = norm, nn.Linear(64, 4)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.out(self.norm(x) * (1 + scale[:, None]) + shift[:, None])


def test_modulated_layer_norm() -> None:
    """To the bit, without the normalised tensor; a norm with weights stays as it is."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 50, 64), torch.randn(2, 64), torch.randn(2, 64)]
    for affine in (False, True):
        network = Modulated(nn.LayerNorm(64, elementwise_affine=affine)).requires_grad_(False)
        small = lean(network)
        assert small.coverage["LayerNorm"] == ((0, 1) if affine else (1, 0))
        y, grads, kept = run(small, inputs)
        want, want_grads, stock = run(network, inputs)
        assert torch.equal(y, want) and all(map(torch.equal, grads, want_grads))
        assert stock - kept == (0 if affine else inputs[0].nbytes + 2 * 2 * 50 * 4)
    network = Modulated(nn.LayerNorm(64, elementwise_affine=False)).requires_grad_(False)
    for use in (
        lambda n, x, s, t: n.out(n.norm(x)),
        lambda n, x, s, t: n.out(n.norm(x) + t[:, None]),
        lambda n, x, s, t: n.out(n.norm(x) * s[:, None]),
        lambda n, x, s, t: n.out(F.silu(n.norm(x)).mul(2)),
    ):
        assert torch.equal(use(lean(network), *inputs), use(network, *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_gates_of_diffusers(dtype: torch.dtype) -> None:
    """RMS norms make float32 copies in half precision; SwiGLU keeps what its activation gave."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    from diffusers.models.activations import SwiGLU
    from diffusers.models.normalization import RMSNorm

    torch.manual_seed(0)
    x = torch.randn(2, 30, 64, dtype=dtype)
    kept = {}
    for make in (lambda: RMSNorm(64, 1e-6), lambda: nn.RMSNorm(64), lambda: SwiGLU(64, 128)):
        network = nn.Sequential(make()).to(dtype).requires_grad_(False)
        small = lean(network)
        name = type(network[0]).__module__.split(".")[0] + "." + type(network[0]).__name__
        y, grads, less = run(small, [x])
        want, want_grads, stock = run(network, [x])
        tolerance = dict(rtol=2e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, want, **tolerance)
        torch.testing.assert_close(grads[0], want_grads[0], **tolerance)
        kept[name] = (less, stock)
    half = dtype == torch.bfloat16
    for name in ("diffusers.RMSNorm", "torch.RMSNorm"):
        less, stock = kept[name]
        assert less == 0 and stock > 2 * x.nbytes if half else less == stock <= 2 * 30 * 4 * 2, (name, less, stock)
    less, stock = kept["diffusers.SwiGLU"]
    assert less == 4 * x.nbytes and stock == 6 * x.nbytes


def test_other_transformers() -> None:
    """PixArt (AdaLN of a table) and SD 3.5 (RMS norms of queries and keys, two attentions)."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    torch.manual_seed(0)
    size = {"sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    pixart = diffusers.PixArtTransformer2DModel(**size, cross_attention_dim=16, caption_channels=12)
    sd35 = diffusers.SD3Transformer2DModel(
        **size, in_channels=4, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    sizes = {"resolution": None, "aspect_ratio": None}
    calls = {
        pixart: lambda n: lambda x, text, t: n(x, text, t, added_cond_kwargs=sizes).sample,
        sd35: lambda n: lambda x, text, t: n(x, text, text[:, 0], t).sample,
    }
    for network, call in calls.items():
        network.eval().double().requires_grad_(False)
        small = lean(network)
        assert small.coverage["LayerNorm"][1] == 0
        inputs = [torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.rand(2) * 999]
        inputs = [t.double() for t in inputs]
        y, grads, kept = run(call(small), inputs)
        want, want_grads, stock = run(call(network), inputs)
        torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
        for got, expected in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        assert kept < 0.9 * stock, (kept, stock)


def test_joined_skip_connections() -> None:
    """Their group norm keeps the parts, which are there anyway, and gives each a gradient of its own memory."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    from diffusers.models.unets.unet_2d_blocks import UpBlock2D

    torch.manual_seed(0)
    up = UpBlock2D(8, 8, 8, temb_channels=4, num_layers=1, resnet_groups=4, add_upsample=False)
    up.double().requires_grad_(False)
    x, skip = (torch.randn(2, 8, 6, 6, dtype=torch.float64) for _ in range(2))
    temb = torch.randn(2, 4, dtype=torch.float64)
    for call in (
        lambda n: lambda x, s: n(x, (s,), temb),
        lambda n: lambda x, s: n(x, res_hidden_states_tuple=(s,), temb=temb),
    ):
        y, grads, kept = run(call(lean(up)), [x, skip])
        want, want_grads, _ = run(call(up), [x, skip])
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        for got, expected in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        assert grads[1].untyped_storage().nbytes() == grads[1].nbytes  # it waits for the encoder, alone
        # The second norm's input, and statistics; the joint tensor is twice as large.
        assert kept < 1.2 * x.nbytes
        changed = [t.clone().requires_grad_() for t in (x, skip)]
        y = call(lean(up))(*changed)
        with torch.no_grad():
            changed[1].mul_(2)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
            y.sum().backward()


EDM_SONG = {"img_channels": 3, "model_type": "SongUNet", "model_channels": 128, "resample_filter": [1, 1]}
NETWORKS = {
    # Constructor, and MiB kept at most for an image and call in float32; stock keeps 113, 292, 692.
    "CIFAR-10": ({**EDM_SONG, "img_resolution": 32, "channel_mult": [2, 2, 2]}, 35),
    "FFHQ-64": ({**EDM_SONG, "img_resolution": 64, "channel_mult": [1, 2, 2, 2]}, 82),
    "ADM-64": (
        {
            "img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet",
            "model_channels": 192, "channel_mult": [1, 2, 3, 4],
        },
        181,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_of_the_published_edm_networks(name: str) -> None:
    """Full size, without memory: fake tensors."""
    arguments, most = NETWORKS[name]
    with FakeTensorMode():
        network = build_edm(arguments).requires_grad_(False)
        x = torch.randn(1, 3, arguments["img_resolution"], arguments["img_resolution"], requires_grad=True)
        labels = torch.zeros(1, 1000) if "label_dim" in arguments else None
        sigma = torch.ones(1, dtype=torch.float64, requires_grad=True)
        with ByteTracker() as bytes:
            y = network(x, sigma, labels)
    assert (bytes.live - y.nbytes) / 2**20 <= most


def test_bytes_of_stable_diffusion() -> None:
    """SD 1.5's network at 64x64 latents: 1,475 MiB in diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    with FakeTensorMode():
        network = lean(diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).requires_grad_(False))
        x, text = torch.randn(1, 4, 64, 64, requires_grad=True), torch.randn(1, 77, 768)
        with ByteTracker() as bytes:
            y = network(x, torch.ones(1), text).sample
    assert (bytes.live - y.nbytes) / 2**20 <= 918
