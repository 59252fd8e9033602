"""`conv_frozen`: a convolution whose weights are constants, and which therefore keeps nothing.

Shapes: x [B, C, *] with one to three spatial dimensions, weight [C', C/groups, *] ([C, C'/groups, *] transposed).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _native as core
from ._samples import Sample, draw
from .reference import conv_frozen_reference

__all__ = ["conv_frozen"]


def conv_frozen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> Tensor:
    """A convolution (or transposed convolution) with frozen weights: PyTorch's own kernels, but no input kept.

    y = weight * x + bias;  dL/dx = weight^T * dL/dy, for which x is not needed. `torch.nn.functional.conv2d` saves x
    all the same, frozen weight or not; `linear` and `matmul` do not, and need no such op.

    Shapes and dtypes: those of `torch.nn.functional.conv1d/2d/3d` and `conv_transpose1d/2d/3d`, told apart by the rank
    of x; channels_last stays so; autocast applies. Differentiable in x, any number of times.
    Memory: keeps 0 bytes (the weight is there anyway; autocast keeps its narrow copy), where `conv2d` keeps x. The
    backward pass calls `aten::convolution_backward` for the input alone; where the output is smaller than x it borrows
    the size of x once, uninitialised. The numbers are those of PyTorch, bit for bit.
    Raises: ValueError (rank) and RuntimeError (a weight or bias that wants a gradient).

        weight = network.conv.weight.requires_grad_(False)
        y = conv_frozen(x, weight, padding=1)
        y.sum().backward()                                # x.grad is there; x itself was not kept
    """
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        checks.check_list("conv_frozen", "(x, weight)", (x, weight))
    if isinstance(padding, str):
        raise ValueError(
            f"conv_frozen: padding must be numbers, got {padding!r}; 'same' is (kernel - 1) * dilation / 2"
        )
    dims = x.dim() - 2
    if dims not in (1, 2, 3) or weight.dim() != x.dim():
        raise ValueError(
            f"conv_frozen: x must be [B, C, *] with 1 to 3 spatial dimensions and weight of the same rank, got "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    checks.check_frozen("conv_frozen", weight=weight, bias=bias)
    if core.transformed():
        return conv_frozen_reference(x, weight, bias, stride, padding, dilation, groups, transposed, output_padding)
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = (_autocast(t, x.device.type) for t in (x, weight, bias))
    stride, padding, dilation = _each(stride, dims), _each(padding, dims), _each(dilation, dims)
    return _conv_frozen(x, weight, bias, stride, padding, dilation, transposed, _each(output_padding, dims), groups)


def _each(v: int | Sequence[int], dims: int) -> Sequence[int]:
    return (v,) * dims if isinstance(v, int) else v


def _autocast(t: Tensor | None, device: str) -> Any:
    """As autocast does it: floating tensors, but not float64."""
    if t is None or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(device))


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return torch.convolution(x, weight, bias, *geometry)


def _conv_input_gradient(g: Tensor, weight: Tensor, size: list[int], channels_last: bool, *geometry: Any) -> Tensor:
    # Of the input, aten reads the size and the layout. Where g has the room, its own memory plays that part.
    layout = core.CHANNELS_LAST[g.dim()] if channels_last else torch.contiguous_format
    g = g.contiguous(memory_format=layout)
    if g.shape == tuple(size):
        x = g
    elif math.prod(size) <= g.numel() and not isinstance(g, torch._subclasses.FakeTensor):
        x = g.as_strided(size, _strides(size, channels_last))
    else:
        x = torch.empty(size, dtype=g.dtype, device=g.device, memory_format=layout)
    return torch.ops.aten.convolution_backward.default(g, x, weight, None, *geometry, (True, False, False))[0]


def _strides(size: Sequence[int], channels_last: bool) -> list[int]:
    """Of a dense tensor, its dimensions listed from the innermost: [*, C, B], or [C, *, B]."""
    order = list(range(len(size) - 1, 0, -1))
    if channels_last:
        order = [1, *order[:-1]]
    strides, step = [0] * len(size), 1
    for dim in (*order, 0):
        strides[dim] = step
        step *= size[dim]
    return strides


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.geometry = inputs
    ctx.size, ctx.channels_last = x.shape, core.layout(x) != torch.contiguous_format
    ctx.save_for_backward(weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    d_x = _conv_frozen_backward(g, weight, ctx.size, ctx.channels_last, *ctx.geometry)
    return d_x, *[None] * 8


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, _, *ctx.geometry = inputs
    ctx.save_for_backward(weight)


def _backward_twice(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of a linear map's transpose is the map."""
    (weight,) = ctx.saved_tensors
    return _conv_frozen(gg, weight, None, *ctx.geometry), *[None] * 9


def _merged(info: Any, x_dim: int | None, x: Tensor, run: Any) -> tuple[Tensor, int]:
    """A mapped dimension of x joins its batch."""
    assert x_dim is not None
    x = x.movedim(x_dim, 0)
    return run(x.flatten(0, 1)).unflatten(0, x.shape[:2]), 0


def _vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, int]:
    if in_dims[1] is not None or in_dims[2] is not None:
        raise NotImplementedError("conv_frozen: vmap over weights is not supported; map over x")
    return _merged(info, in_dims[0], x, lambda x: torch.ops.gas_engine.conv_frozen(x, weight, *rest))


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], g: Tensor, weight: Tensor, size: list[int], *rest: Any
) -> tuple[Tensor, int]:
    def run(g: Tensor) -> Tensor:
        return torch.ops.gas_engine.conv_frozen_backward(g, weight, [g.shape[0], *size[1:]], *rest)

    return _merged(info, in_dims[0], g, run)


_GEOMETRY = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups"
)
_conv_frozen = core.register(
    f"conv_frozen(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    _conv,
    _conv,
    _backward,
    _setup,
    _vmap,
    keys=("CPU", "CUDA", "MPS", "XPU"),
)
_conv_frozen_backward = core.register(
    f"conv_frozen_backward(Tensor g, Tensor weight, SymInt[] size, bool channels_last, {_GEOMETRY}) -> Tensor",
    _conv_input_gradient,
    _conv_input_gradient,
    _backward_twice,
    _setup_twice,
    _vmap_backward,
    keys=("CPU", "CUDA", "MPS", "XPU"),
)


def conv_frozen_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """1-D to 3-D, strides, groups, dilation, transposed, channels_last, 1 to 1134 pixels, no batch, a slice."""
    generator = torch.Generator().manual_seed(0)

    def sample(
        x: tuple[int, ...], weight: tuple[int, ...], layout: Any = torch.contiguous_format, **kwargs: Any
    ) -> Any:
        channels = weight[1] * kwargs.get("groups", 1) if kwargs.get("transposed") else weight[0]
        return Sample(
            (
                draw(generator, x, dtype, device, requires_grad, layout),
                draw(generator, weight, dtype, device, layout=layout),
                draw(generator, (channels,), dtype, device),
            ),
            kwargs,
        )

    yield sample((2, 3, 5, 7), (4, 3, 3, 3), padding=1)
    yield sample((2, 4, 9, 6), (4, 4, 3, 3), torch.channels_last, padding=1, stride=2)
    yield sample((1, 6, 5, 5), (6, 1, 3, 3), padding=(1, 0), groups=6)
    yield sample((2, 3, 129), (2, 3, 3), padding=2, dilation=2)
    yield sample((1, 2, 3, 4, 3), (3, 2, 1, 1, 1))
    yield sample((2, 4, 4, 3), (4, 3, 4, 4), stride=2, padding=1, transposed=True, output_padding=1)
    yield sample((3, 2, 1, 1), (5, 2, 1, 1))
    yield sample((2, 2, 1134), (3, 2, 3), padding=1)
    yield sample((0, 3, 5, 7), (4, 3, 3, 3), padding=1, stride=2)
    (x, *constant), kwargs = sample((2, 3, 5, 14), (4, 3, 3, 3), padding=1)
    yield Sample((x.detach()[..., ::2].requires_grad_(requires_grad), *constant), kwargs)
