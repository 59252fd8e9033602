"""The U-Nets of the EDM networks: DDPM++ and NCSN++ (``SongUNet``), ADM (``DhariwalUNet``).

Architectures from Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv
2206.00364), appendix F; constructor arguments and tensor names are the published ones.
Shape legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, UNetBlock

# Labels are embedded in the precision that they come in, whatever that of the image is.
_EMBEDDING = ["map_noise", "map_label", "map_augment", "map_layer0", "map_layer1"]


class SongUNet(nn.Module):
    """The DDPM++ / NCSN++ U-Net of Song et al. (arXiv 2011.13456) in EDM's form; x [B, C, H, W] -> [B, C_out, H, W]."""

    _keep_in_fp32_modules = _EMBEDDING

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
        block: dict[str, Any] = dict(
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
        skips: list[Any] = [module.out_channels for name, module in self.enc.items() if "aux" not in name]

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
            labels = _drop_labels(class_labels.to(embedding.dtype), self.label_dropout if self.training else 0.0)
            embedding = embedding + self.map_label(labels * math.sqrt(labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels.to(embedding.dtype))
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding)))).to(x.dtype)

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
                normed = module(x, "silu")
            elif "aux_conv" in name:
                image = module(normed)
                out = image if out is None else image + out
            else:
                x = module(x, embedding, skips.pop() if x.shape[1] != module.in_channels else None)
        assert out is not None
        return out


class DhariwalUNet(nn.Module):
    """The ADM U-Net of Dhariwal and Nichol (arXiv 2105.05233) in EDM's form; x [B, C, H, W] -> [B, C_out, H, W]."""

    _keep_in_fp32_modules = _EMBEDDING

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
        block: dict[str, Any] = dict(embedding_channels=embedding_channels, dropout=dropout)
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
        skips: list[Any] = [module.out_channels for module in self.enc.values()]

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
            embedding = embedding + self.map_augment(augment_labels.to(embedding.dtype))
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None and class_labels is not None:
            embedding = embedding + self.map_label(
                _drop_labels(class_labels.to(embedding.dtype), self.label_dropout if self.training else 0.0)
            )
        embedding = F.silu(embedding).to(x.dtype)

        skips: list[Tensor] = []
        for module in self.enc.values():
            x = module(x, embedding) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for module in self.dec.values():
            x = module(x, embedding, skips.pop() if x.shape[1] != module.in_channels else None)
        return self.out_conv(self.out_norm(x, "silu"))


def _drop_labels(labels: Tensor, rate: float) -> Tensor:
    if rate == 0.0:
        return labels
    return labels * (torch.rand(labels.shape[0], 1, device=labels.device) >= rate).to(labels.dtype)
