"""The EDM networks: DDPM++ and NCSN++ (``SongUNet``), ADM (``DhariwalUNet``), and their preconditioning.

Architecture and preconditioning from Karras et al., "Elucidating the Design Space of Diffusion-Based Generative
Models" (arXiv 2206.00364), Table 1 and appendix F; constructor arguments and tensor names are the published ones.
Shape legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, UNetBlock


class SongUNet(nn.Module):
    """The DDPM++ / NCSN++ U-Net of Song et al. (arXiv 2011.13456) in EDM's form; x [B, C, H, W] -> [B, C_out, H, W]."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        self.label_dropout = label_dropout
        noise_channels = model_channels * channel_mult_noise
        embedding_channels = model_channels * channel_mult_emb
        block = dict(
            embedding_channels=embedding_channels, heads=1, dropout=dropout, skip_scale=math.sqrt(0.5), eps=1e-6,
            resample_filter=resample_filter, project_resampled=True, adaptive_scale=False,
        )  # fmt: skip
        resample: dict[str, Any] = dict(resample_filter=resample_filter)

        positional = embedding_type == "positional"
        self.map_noise = PositionalEmbedding(noise_channels, True) if positional else FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, embedding_channels)
        self.map_layer1 = Linear(embedding_channels, embedding_channels)

        self.enc = nn.ModuleDict()
        width, aux_width = in_channels, in_channels
        for level, mult in enumerate(channel_mult):
            size = img_resolution >> level
            name = f"{size}x{size}"
            if level == 0:
                self.enc[f"{name}_conv"] = Conv2d(width, model_channels, 3)
                width = model_channels
            else:
                self.enc[f"{name}_down"] = UNetBlock(width, width, down=True, **block)
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = Conv2d(aux_width, aux_width, 0, down=True, **resample)
                    self.enc[f"{name}_aux_skip"] = Conv2d(aux_width, width, 1)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv2d(aux_width, width, 3, down=True, fused=True, **resample)
                    aux_width = width
            for index in range(num_blocks):
                attention = size in attn_resolutions
                self.enc[f"{name}_block{index}"] = UNetBlock(width, model_channels * mult, attention=attention, **block)
                width = model_channels * mult
        skips = [module.out_channels for name, module in self.enc.items() if "aux" not in name]

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = img_resolution >> level
            name = f"{size}x{size}"
            deepest = level == len(channel_mult) - 1
            if deepest:
                self.dec[f"{name}_in0"] = UNetBlock(width, width, attention=True, **block)
                self.dec[f"{name}_in1"] = UNetBlock(width, width, **block)
            else:
                self.dec[f"{name}_up"] = UNetBlock(width, width, up=True, **block)
            for index in range(num_blocks + 1):
                attention = index == num_blocks and size in attn_resolutions
                joined = width + skips.pop()
                width = model_channels * mult
                self.dec[f"{name}_block{index}"] = UNetBlock(joined, width, attention=attention, **block)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and not deepest:
                    self.dec[f"{name}_aux_up"] = Conv2d(out_channels, out_channels, 0, up=True, **resample)
                self.dec[f"{name}_aux_norm"] = GroupNorm(width, eps=1e-6)
                self.dec[f"{name}_aux_conv"] = Conv2d(width, out_channels, 3, gain=1e-5)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        embedding = self.map_noise(noise_labels)
        # Published weights expect sines first, the embedding emits cosines first.
        embedding = embedding.unflatten(1, (2, -1)).flip(1).flatten(1)
        if self.map_label is not None and class_labels is not None:
            labels = _drop_labels(class_labels, self.label_dropout if self.training else 0.0)
            embedding = embedding + self.map_label(labels * math.sqrt(labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))

        skips: list[Tensor] = []
        aux = x
        for name, module in self.enc.items():
            if "aux_down" in name:
                aux = module(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + module(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + module(aux)) / math.sqrt(2)
            else:
                x = module(x, embedding) if isinstance(module, UNetBlock) else module(x)
                skips.append(x)

        out: Tensor | None = None
        normed = x
        for name, module in self.dec.items():
            if "aux_up" in name:
                out = module(out)
            elif "aux_norm" in name:
                normed = module(x)
            elif "aux_conv" in name:
                image = module(F.silu(normed))
                out = image if out is None else image + out
            else:
                if x.shape[1] != module.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, embedding)
        assert out is not None
        return out


class DhariwalUNet(nn.Module):
    """The ADM U-Net of Dhariwal and Nichol (arXiv 2105.05233) in EDM's form; x [B, C, H, W] -> [B, C_out, H, W]."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.label_dropout = label_dropout
        embedding_channels = model_channels * channel_mult_emb
        block = dict(embedding_channels=embedding_channels, dropout=dropout)
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, embedding_channels)
        self.map_layer1 = Linear(embedding_channels, embedding_channels)
        self.map_label = Linear(label_dim, embedding_channels, bias=False) if label_dim else None

        self.enc = nn.ModuleDict()
        width = in_channels
        for level, mult in enumerate(channel_mult):
            size = img_resolution >> level
            name = f"{size}x{size}"
            if level == 0:
                self.enc[f"{name}_conv"] = Conv2d(width, model_channels * mult, 3)
                width = model_channels * mult
            else:
                self.enc[f"{name}_down"] = UNetBlock(width, width, down=True, **block)
            for index in range(num_blocks):
                attention = size in attn_resolutions
                self.enc[f"{name}_block{index}"] = UNetBlock(width, model_channels * mult, attention=attention, **block)
                width = model_channels * mult
        skips = [module.out_channels for module in self.enc.values()]

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = img_resolution >> level
            name = f"{size}x{size}"
            if level == len(channel_mult) - 1:
                self.dec[f"{name}_in0"] = UNetBlock(width, width, attention=True, **block)
                self.dec[f"{name}_in1"] = UNetBlock(width, width, **block)
            else:
                self.dec[f"{name}_up"] = UNetBlock(width, width, up=True, **block)
            for index in range(num_blocks + 1):
                joined = width + skips.pop()
                width = model_channels * mult
                attention = size in attn_resolutions
                self.dec[f"{name}_block{index}"] = UNetBlock(joined, width, attention=attention, **block)
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv2d(width, out_channels, 3, gain=1e-5)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        embedding = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None and class_labels is not None:
            embedding = embedding + self.map_label(
                _drop_labels(class_labels, self.label_dropout if self.training else 0.0)
            )
        embedding = F.silu(embedding)

        skips: list[Tensor] = []
        for module in self.enc.values():
            x = module(x, embedding) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for module in self.dec.values():
            if x.shape[1] != module.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = module(x, embedding)
        return self.out_conv(F.silu(self.out_norm(x)))


def _drop_labels(labels: Tensor, rate: float) -> Tensor:
    if rate == 0.0:
        return labels
    return labels * (torch.rand(labels.shape[0], 1, device=labels.device) >= rate).to(labels.dtype)


class EDMNetwork(nn.Module):
    """``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)`` (arXiv 2206.00364, equation 7)."""

    sigma_min: float
    sigma_max: float

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, model_type: str = "SongUNet", **model: Any
    ) -> None:
        super().__init__()
        networks = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
        if model_type not in networks:
            raise ValueError(f"model_type is {model_type!r}; it must be one of {', '.join(networks)}")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.model = networks[model_type](img_resolution, img_channels, img_channels, label_dim=label_dim, **model)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (c_skip, c_out, c_in, c_noise), each of sigma's shape, in float64."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], sigma scalar or [B], labels one-hot [B, label_dim] -> denoised x, in the dtype of x."""
        # Scalars stay in float64 until they meet the image: a float32 log(sigma) already moves a learned time.
        level = torch.as_tensor(sigma, device=x.device).to(torch.float64).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = (c.to(x.dtype) for c in self.coefficients(level))
        if self.label_dim == 0:
            labels = None
        elif labels is None:
            labels = torch.zeros(1, self.label_dim, device=x.device, dtype=x.dtype)
        else:
            labels = labels.to(x.dtype).reshape(-1, self.label_dim)
        if augment_labels is not None:
            augment_labels = augment_labels.to(x.dtype)
        return c_skip * x + c_out * self.model(c_in * x, c_noise.flatten(), labels, augment_labels)


class EDMPrecond(EDMNetwork):
    """EDM preconditioning (arXiv 2206.00364, Table 1, "Ours")."""

    def __init__(
        self, *args: Any, sigma_min: float = 0.0, sigma_max: float = math.inf, sigma_data: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(*args, **{"model_type": "DhariwalUNet", **kwargs})
        self.sigma_min, self.sigma_max, self.sigma_data = float(sigma_min), float(sigma_max), sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = sigma.square() + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt(), total.rsqrt(), sigma.log() / 4


class VPPrecond(EDMNetwork):
    """Variance-preserving preconditioning (arXiv 2206.00364, Table 1, "VP")."""

    def __init__(
        self, *args: Any, beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        self.sigma_min, self.sigma_max = self._sigma(epsilon_t), self._sigma(1.0)

    def _sigma(self, t: float) -> float:
        return math.sqrt(math.expm1(self.beta_d * t * t / 2 + self.beta_min * t))

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        growth = 2 * self.beta_d * torch.log1p(sigma.square())
        # The root of beta_d t^2 / 2 + beta_min t = log(1 + sigma^2), written so that small sigma keep their digits.
        t = growth / ((self.beta_min**2 + growth).sqrt() + self.beta_min) / self.beta_d
        return torch.ones_like(sigma), -sigma, (sigma.square() + 1).rsqrt(), (self.M - 1) * t


class VEPrecond(EDMNetwork):
    """Variance-exploding preconditioning (arXiv 2206.00364, Table 1, "VE")."""

    def __init__(self, *args: Any, sigma_min: float = 0.02, sigma_max: float = 100.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(sigma)
        return one, sigma, one, (sigma / 2).log()


def build_edm(
    kwargs: Mapping[str, Any], state_dict: Mapping[str, Any] | None = None, precond: str = "EDMPrecond"
) -> EDMNetwork:
    """Build an EDM network from its published constructor arguments, frozen and in eval mode.

    ``state_dict`` holds tensors or NumPy arrays under the published names; without it the weights are random.
    The network follows the dtype of its input. Call ``requires_grad_(True).train()`` to train it.

    Raises ValueError for an unknown preconditioning or argument and for tensors that are missing, left over
    or of another shape.

        network = build_edm({"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet"})
        denoised = network(x, sigma)
    """
    classes: dict[str, type[EDMNetwork]] = {"EDMPrecond": EDMPrecond, "VPPrecond": VPPrecond, "VEPrecond": VEPrecond}
    if precond not in classes:
        raise ValueError(f"precond is {precond!r}; it must be one of {', '.join(classes)}")
    options = {name: value for name, value in kwargs.items() if name != "use_fp16"}
    try:
        network = classes[precond](**options)
    except TypeError as error:
        known = sorted(set(inspect.signature(SongUNet).parameters) | set(inspect.signature(DhariwalUNet).parameters))
        raise ValueError(f"the network does not take these arguments ({error}); known: {', '.join(known)}") from None
    if state_dict is not None:
        tensors = {name: torch.as_tensor(value) for name, value in state_dict.items()}
        try:
            network.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit this network: {' '.join(str(error).split())}") from None
    return network.requires_grad_(False).eval()
