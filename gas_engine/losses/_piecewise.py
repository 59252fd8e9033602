"""A network as the pieces of `_pieces`, if it is piecewise linear; modules are checked, and refused by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..memory._view import hooked
from ..networks import _r3gan_layers as layers
from ..networks.r3gan import R3GANDiscriminator
from ._pieces import Accumulate, Activation, Chain, Convolution, Flatten, Half, Linear, Piece, Readout, Residual


def pieces(D: nn.Module, accumulate: Accumulate, cond: Any = None) -> Piece:
    """The network as pieces, for one side of one micro-batch.

    Modules are known by their exact class: of a subclass nobody knows what its forward does. Raises ValueError for any
    other, with its name, for hooks, and for padding modes other than zeros.
    """
    names = {id(m): f"D.{name}" if name else "D" for name, m in D.named_modules()}

    def build(m: Any) -> Piece:
        kind = type(m)
        if hooked(m):
            raise ValueError(_REFUSED.format(name=names[id(m)], kind=f"{kind.__name__} with hooks"))
        if kind is R3GANDiscriminator:
            return Chain([*map(build, m.chain()), Readout(m, cond, accumulate)])
        if kind is layers.ResidualBlock:
            return Residual([*map(build, m.chain())])
        if kind in (layers.Stage, layers.Transition, layers.Head, layers.Layer, nn.Sequential):
            return Chain([*map(build, m if kind is nn.Sequential else m.chain())])
        if kind in (layers.Conv2d, nn.Conv2d) and m.padding_mode == "zeros" and not isinstance(m.padding, str):
            return Convolution(m, accumulate)
        if kind in (layers.Linear, nn.Linear):
            return Linear(m, accumulate)
        if kind is layers.BiasedActivation:
            return Activation(m.Bias, layers.SLOPE, accumulate)
        if kind in (nn.LeakyReLU, nn.ReLU):
            return Activation(None, getattr(m, "negative_slope", 0.0), accumulate)
        if kind is layers.Downsample:
            return Half(m.taps)
        if kind is nn.Flatten:
            return Flatten(m)
        if kind is nn.Identity:
            return Chain([])
        raise ValueError(_REFUSED.format(name=names[id(m)], kind=kind.__name__))

    return build(D)


_REFUSED = (
    "the piecewise method needs a network that is piecewise linear in x: convolutions, linear layers, leaky ReLU, "
    "ReLU, flattening and R3GAN's blocks, and {name} is a {kind}; use method='double_backward' or "
    "'forward_over_reverse'"
)
