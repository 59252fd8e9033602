"""Layers of the R3GAN discriminator, under its published tensor names (arXiv 2501.05441, section 4).

Shape legend: B batch, C channels, H W height and width, E embedding channels.
A layer with a `chain()` applies it in order to its input; every layer follows the dtype of its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bias_leaky_relu, conv_frozen, resample2d

SLOPE = 0.2  # of every leaky ReLU
ACTIVATION_GAIN = math.sqrt(2 / (1 + SLOPE**2))


def apply(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class Conv2d(nn.Conv2d):
    """Convolution without bias, N(0, gain / sqrt(fan_in)); with frozen weights its graph keeps nothing."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, groups: int = 1, padding: int = 0, gain: float = 1.0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=padding, groups=groups, bias=False)
        nn.init.normal_(self.weight, std=gain / math.sqrt(in_channels // groups * kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        frozen = not (self.weight.requires_grad and torch.is_grad_enabled())
        conv: Any = conv_frozen if frozen else F.conv2d
        return conv(x, self.weight.to(x.dtype), padding=self.padding, groups=self.groups)


class Linear(nn.Linear):
    """Linear map without bias, N(0, 1 / sqrt(fan_in))."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Layer(nn.Module):
    """A convolution under the published name `Layer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.Layer = Conv2d(*args, **kwargs)

    def chain(self) -> list[nn.Module]:
        return [self.Layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.Layer(x)


class BiasedActivation(nn.Module):
    """Leaky ReLU of x + bias[c]; keeps one bit an element."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.Bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return bias_leaky_relu(x, self.Bias, SLOPE)


class Downsample(nn.Module):
    """Images to half their size by a separable low-pass filter."""

    Kernel: Tensor

    def __init__(self, taps: Sequence[float]) -> None:
        super().__init__()
        self.taps = [float(t) for t in taps]
        f = torch.tensor(self.taps) / sum(self.taps)
        self.register_buffer("Kernel", torch.outer(f, f))

    def forward(self, x: Tensor) -> Tensor:
        return resample2d(x, self.taps)


class ResidualBlock(nn.Module):
    """x + 1x1(act(grouped 3x3(act(1x1(x))))), wider inside by `expansion`; the last convolution starts at zero."""

    def __init__(self, width: int, cardinality: int, expansion: int, gain: float) -> None:
        super().__init__()
        inner = width * expansion
        self.LinearLayer1 = Layer(width, inner, 1, gain=gain)
        self.NonLinearity1 = BiasedActivation(inner)
        self.LinearLayer2 = Layer(inner, inner, 3, groups=cardinality, padding=1, gain=gain)
        self.NonLinearity2 = BiasedActivation(inner)
        self.LinearLayer3 = Layer(inner, width, 1, gain=0.0)

    def chain(self) -> list[nn.Module]:
        """What is applied to x, in order, before x is added."""
        return [self.LinearLayer1, self.NonLinearity1, self.LinearLayer2, self.NonLinearity2, self.LinearLayer3]

    def forward(self, x: Tensor) -> Tensor:
        return x + apply(self.chain(), x)


class Transition(nn.Module):
    """Half the size, then a 1x1 convolution where the width changes."""

    def __init__(self, width: int, next_width: int, taps: Sequence[float]) -> None:
        super().__init__()
        self.Resampler = Downsample(taps)
        if width != next_width:
            self.LinearLayer = Layer(width, next_width, 1)

    def chain(self) -> list[nn.Module]:
        return list(self.children())

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.chain(), x)


class Head(nn.Module):
    """4x4 depthwise convolution without padding, then a linear map: [B, C, 4, 4] -> [B, E]."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.Basis = Conv2d(width, width, 4, groups=width)
        self.Flatten = nn.Flatten()
        self.LinearLayer = Linear(width, embedding)

    def chain(self) -> list[nn.Module]:
        return list(self.children())

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.chain(), x)


class Stage(nn.Module):
    """Residual blocks of one width, then the way out of it."""

    def __init__(self, blocks: Sequence[ResidualBlock], last: Transition | Head) -> None:
        super().__init__()
        self.Layers = nn.ModuleList([*blocks, last])

    def chain(self) -> list[nn.Module]:
        return list(self.Layers)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.chain(), x)
