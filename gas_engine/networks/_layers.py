"""Layers of the EDM U-Nets: convolution with built-in resampling, group norm, time embeddings, residual block.

Shape legend: B batch, C channels, H W height and width, E embedding channels.
Every layer follows the dtype of its input, so one network runs in float32 and, for checks, in float64.
Tensor names are those of the published EDM networks (arXiv 2206.00364), so their state dicts load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory._frames import rebuilding
from ..memory._joined import join
from ..memory._parts import conv_of_parts, norm_of_parts
from ..ops import _native as core
from ..ops import conv_frozen, group_norm_silu, resample2d


def _xavier_uniform(shape: Sequence[int], fan_in: int, fan_out: int, gain: float) -> nn.Parameter:
    bound = math.sqrt(6.0 / (fan_in + fan_out)) * gain
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Linear(nn.Module):
    """Affine map ``x W^T + b`` in the dtype of ``x``; x [B, in] -> [B, out]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = _xavier_uniform((out_features, in_features), in_features, out_features, gain)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution, optionally preceded (up) or followed in effect (down) by separable FIR resampling by 2.

    ``kernel=0`` resamples only. ``fused`` pads once for convolution and filter together, as the residual encoder
    of NCSN++ does. x [B, C, H, W] -> [B, C', H', W'].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.resample_filter: Tensor | None
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused = up, down, fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            area = kernel * kernel
            shape = (out_channels, in_channels, kernel, kernel)
            self.weight = _xavier_uniform(shape, in_channels * area, out_channels * area, gain)
            self.bias = nn.Parameter(torch.zeros(out_channels))
        self.taps = [float(t) for t in resample_filter]
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        outer = torch.outer(taps, taps)[None, None] / taps.sum().square()
        self.register_buffer("resample_filter", outer if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.weight is None or not (self.weight.requires_grad and torch.is_grad_enabled())
        conv: Any = conv_frozen if frozen else F.conv2d
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        pad = 0 if weight is None else weight.shape[-1] // 2
        if self.resample_filter is None:
            assert weight is not None
            return conv_of_parts([x], weight, bias) if frozen and pad == 0 else conv(x, weight, bias, padding=pad)
        filter_ = self.resample_filter.to(x.dtype)
        filter_pad = (filter_.shape[-1] - 1) // 2
        fused = self.fused and weight is not None
        if self.up and fused:
            taps = (4 * filter_).expand(self.in_channels, 1, -1, -1)
            shared = max(filter_pad - pad, 0)
            x = F.conv_transpose2d(x, taps, groups=self.in_channels, stride=2, padding=shared)
            pad = max(pad - filter_pad, 0)
        elif self.up:
            x = resample2d(x, self.taps, up=2, down=1)
        if self.down and not fused:
            x = resample2d(x, self.taps)
        if weight is None:
            return x
        if self.down and fused:
            x = conv(x, weight, padding=pad + filter_pad)
            x = conv_frozen(x, filter_.expand(self.out_channels, 1, -1, -1), groups=self.out_channels, stride=2)
            return x if bias is None else x + bias[:, None, None]
        return conv(x, weight, bias, padding=pad)

    def of_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """Of the joined parts; a pointwise convolution need not join them."""
        weight = self.weight
        if weight is None or self.up or self.down or weight.shape[-1] > 1 or weight.requires_grad:
            return self(join(parts))
        dtype = parts[0].dtype
        return conv_of_parts(parts, weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class GroupNorm(nn.Module):
    """Group normalisation with at most 32 groups and at least 4 channels in each, modulated and activated.

    act(norm(x) (1 + scale) + shift), act "silu" or "none"; x [B, C, H, W], scale and shift [B, C, 1, 1]. With frozen
    weights one op that keeps only x.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = min(32, channels // 4)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, act: str = "none", scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return group_norm_silu(x, self.groups, self.weight, self.bias, self.eps, scale, shift, act)
        h = F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift, h, scale + 1)
        return F.silu(h) if act == "silu" else h

    def of_parts(self, parts: Sequence[Tensor], act: str = "none") -> Tensor:
        """Of the joined parts, which are kept instead of the whole."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            return self(join(parts), act)
        return norm_of_parts(parts, self.groups, self.weight, self.bias, self.eps, act)


class PositionalEmbedding(nn.Module):
    """Cosines, then sines, of geometric frequencies 1 .. 1/10000; t [B] -> [B, channels]."""

    def __init__(self, channels: int, endpoint: bool = False) -> None:
        super().__init__()
        self.count = channels // 2
        self.spacing = self.count - (1 if endpoint else 0)

    def forward(self, t: Tensor) -> Tensor:
        exponent = torch.arange(self.count, dtype=t.dtype, device=t.device) / self.spacing
        phase = torch.outer(t, (1 / 10000) ** exponent)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Cosines, then sines, of fixed random frequencies N(0, 16^2); t [B] -> [B, channels]."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        phase = torch.outer(t, 2 * math.pi * self.freqs.to(t.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block conditioned on a time embedding, with optional resampling and self-attention.

    x [B, C, H, W], embedding [B, E] -> [B, C', H', W']. With ``adaptive_scale`` the embedding scales and shifts
    the second norm (ADM); without, it is added before it (DDPM++, NCSN++). In a decoder, x and the ``encoded`` tensor
    share the C channels: what needs them joined joins them in here, so that a checkpoint keeps these two alone.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        heads: int | None = None,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        project_resampled: bool = False,
        adaptive_scale: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.heads = (heads or out_channels // 64) if attention else 0
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale

        self.norm0 = GroupNorm(in_channels, eps)
        resample: dict[str, Any] = dict(up=up, down=down, resample_filter=resample_filter)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample)
        self.affine = Linear(embedding_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=1e-5)
        self.skip: Conv2d | None = None
        if out_channels != in_channels or up or down:
            kernel = 1 if project_resampled or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **resample)
        if self.heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, gain=1e-5)

    def forward(self, x: Tensor, embedding: Tensor, encoded: Tensor | None = None) -> Tensor:
        parts = [x] if encoded is None else [x, encoded]
        skip = None
        if self.heads or not rebuilding():
            skip = self._skip(parts)
        elif not self._projects_unsaved(x):
            self._skip(parts)  # nothing is saved behind its sum, but what it saves itself has its turn
        h = self.norm0(x, "silu") if encoded is None else self.norm0.of_parts(parts, "silu")
        h = self.conv0(h)
        label = self.affine(embedding)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = label.chunk(2, dim=1)
            h = self.norm1(h, "silu", scale, shift)
        else:
            h = h + label
            h = self.norm1(h, "silu")
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self._sum(h, self._skip(parts) if skip is None else skip)
        return self._sum(self._attend(x), x) if self.heads else x

    def _sum(self, h: Tensor, x: Tensor) -> Tensor:
        """(h + x) skip_scale; h is a convolution's, which keeps no output, and is written over unless x is wider."""
        return (h.add_(x) if h.dtype == x.dtype else h + x).mul_(self.skip_scale)

    def _projects_unsaved(self, x: Tensor) -> bool:
        """Whether the short way saves nothing: a weight that is cast for x, or that comes and goes, is saved."""
        if self.skip is None:
            return True
        weight = self.skip.weight
        same = (weight is None or weight.dtype == x.dtype) and not torch.is_autocast_enabled(x.device.type)
        return same and self.skip.resample_filter is None and rebuilding(weight)

    def _skip(self, parts: Sequence[Tensor]) -> Tensor:
        """The block's input on the short way: as it is, resampled, or projected."""
        if self.skip is None:
            return join(parts)
        return self.skip(parts[0]) if len(parts) == 1 else self.skip.of_parts(parts)

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        # Published layout: channels split as [head, channel, (q, k, v)], positions last.
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.heads, channels // self.heads, 3, -1)
        # Dense heads: the fused attention kernels ask for them, and the others keep the attention matrix.
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        # In the layout of x: heads lie channels last, and the layers behind would copy their weights to fit.
        return self.proj(mixed.transpose(2, 3).reshape(x.shape).contiguous(memory_format=core.layout(x)))
