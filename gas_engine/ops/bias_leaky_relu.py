"""`bias_leaky_relu`: the discriminator's only nonlinearity, which keeps one bit per element for its derivatives.

Shapes: x [B, C, *], bias [C]; bits uint8 [ceil(N / 8)] for the N elements of x in memory order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _native as core
from ._samples import Sample, draw
from .reference import accumulation_dtype, bias_leaky_relu_reference

__all__ = ["bias_leaky_relu"]


def bias_leaky_relu(x: Tensor, bias: Tensor | None = None, slope: float = 0.2) -> Tensor:
    """Leaky ReLU of x + bias, differentiable any number of times from one bit per element.

    y = v if v > 0 else slope v, v = x + bias[c] (Maas et al. 2013, eq. 2). With m = 1 where v > 0, else slope:
    dx = m g and dbias[c] = sum of dx over channel c; and as m does not depend on g, the second derivative in x is
    zero and that of dx and dbias in g is m (gg_dx + gg_dbias[c]), from the same bits: exact double backward, as R1
    and R2 penalties ask for it. At v = 0 the slope counts; a NaN passes through.

    Shapes and dtypes: x [B, C, ...] of rank 2 or more (any rank without bias), float32, float64, bfloat16 or
    float16; bias [C] of any floating dtype, on x's device. y has the shape, dtype and layout of x (contiguous or
    channels_last; anything else is made contiguous). slope: any finite number. v is formed in float32 (float64
    where x is float64) and rounded once; dbias is summed in short float32 runs, and those in float64, in a fixed
    order: the same bits for every run and every number of threads.
    Error against the float64 twin at [8, 96, 32, 32], relative L2 (bias over norm): y float32 2.8e-8 (< 2e-9), bfloat16
    1.8e-3 and float16 2.3e-4 (the rounding of the result; < 6e-6 and < 2e-6); dbias 1e-7 (< 1e-8) before it takes
    bias's dtype.
    Memory: reads x once, writes y once and, where a gradient is wanted, N / 8 bytes of signs: all that is kept,
    1/32 of x in float32, whatever else happens to x and y. Backward: reads g once, writes dx once.
    Raises: ValueError (shapes, devices, slope) or TypeError (dtypes), with the value seen.

        x, bias = torch.randn(8, 384, 32, 32), torch.zeros(384)
        y = bias_leaky_relu(x, bias)
        y = bias_leaky_relu(x, slope=0.01)
    """
    _check("bias_leaky_relu", x, bias)
    if not torch.compiler.is_compiling() and (not isinstance(slope, int | float) or not math.isfinite(slope)):
        raise ValueError(f"bias_leaky_relu: slope must be a finite number, got {slope!r}")
    if not core.runs_on(x):
        return bias_leaky_relu_reference(x, bias, slope)
    if bias is not None and bias.dtype is not (wide := accumulation_dtype(x.dtype)):
        bias = bias.to(wide)
    result: Tensor = _op(x, bias, float(slope), core.layout(x) != torch.contiguous_format)
    return result


def _check(op: str, x: Tensor, bias: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in checks.DTYPES:
        raise TypeError(f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        seen = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"{op}: bias must be a floating tensor or None, got {seen}")
    if x.dim() < 2:
        raise ValueError(f"{op}: with a bias x must be [B, C, ...], got {list(x.shape)}")
    if bias.dim() != 1 or bias.shape[0] != x.shape[1]:
        raise ValueError(f"{op}: bias must be [{x.shape[1]}], one number per channel of x, got {list(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"{op}: bias must be on x's device {x.device}, got {bias.device}")


def bias_leaky_relu_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """Odd sizes spread over the dimensions, planes of 1 to 300 x 301 pixels, channels_last, no bias, other slopes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(0, 3), (2, 0, 4), (1, 1), (3, 1), (129, 3), (2, 567), (3, 6, 9, 7), (2, 384, 4, 4), (1, 129, 8, 8)]
    for shape in [
        *shapes,
        (2, 3, 65),
        (5, 40, 3, 11),
        (1, 2, 2, 3, 5),
        (1, 3, 64, 129),
        (2, 1134, 1),
        (1, 100, 13, 13),
    ]:
        x = draw(generator, shape, dtype, device, requires_grad)
        bias = draw(generator, shape[1:2], dtype, device, requires_grad)
        yield Sample((x, bias))
        if len(shape) in core.CHANNELS_LAST:
            x = draw(generator, shape, dtype, device, requires_grad, core.CHANNELS_LAST[len(shape)])
            yield Sample((x, bias), {"slope": 0.01})
            yield Sample((x,), {"slope": -1.5})
    for shape in ((), (3,), (1134,)):
        yield Sample((draw(generator, shape, dtype, device, requires_grad),))


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=core.CHANNELS_LAST[x.dim()] if channels_last else torch.contiguous_format)


_kernel = core.kernel("bias_leaky_relu")


def _launch(
    x: Tensor,
    bias: Tensor | None,
    slope: float,
    y: Tensor,
    bits: Tensor | None,
    packs: bool = False,
    dbias: Tensor | None = None,
) -> None:
    """Run the kernel on x in its layout."""
    n = x.numel()
    if n == 0:  # empty tensors have null pointers: nothing is launched for them
        if dbias is not None:
            dbias.zero_()
        return
    channels, inner = 1, n
    if x.dim() > 1:
        channels = x.shape[1]
        inner = n // (x.shape[0] * channels) if x.is_contiguous() else 1
    workspace = None
    if dbias is not None and x.is_cuda:
        assert core.native is not None
        workspace = torch.empty(channels * core.native.BIAS_SPLITS, dtype=torch.float64, device=x.device)
    bias = None if bias is None else bias.contiguous()
    _kernel(x, x, x, bias, slope, y, bits, packs, dbias, workspace, n, channels, inner)


def _prepare(
    op: str, x: Tensor, bias: Tensor | None, channels_last: bool, bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Checked x in the wanted layout, and the empty result."""
    _check(op, x, bias)
    wide = accumulation_dtype(x.dtype)
    if bias is not None and bias.dtype != wide:
        raise TypeError(f"{op}: bias must be {wide}, got {bias.dtype}; call gas_engine.ops, which converts it")
    if channels_last and x.dim() not in core.CHANNELS_LAST:
        raise ValueError(f"{op}: channels_last asks for four or five dimensions, got {list(x.shape)}")
    if bits is not None and (
        bits.dtype != torch.uint8 or bits.shape != (_bytes(x),) or bits.device != x.device or not bits.is_contiguous()
    ):
        seen = f"{bits.dtype} {list(bits.shape)} on {bits.device}"
        raise ValueError(f"{op}: bits must be uint8 [{_bytes(x)}] as the forward op gave them, got {seen}")
    x = _dense(x, channels_last)
    return x, torch.empty_like(x)


def _bytes(x: Tensor) -> Any:
    return (x.numel() + 7) // 8


def _forward(x: Tensor, bias: Tensor | None, slope: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    x, y = _prepare("bias_leaky_relu", x, bias, channels_last)
    bits = x.new_empty(_bytes(x), dtype=torch.uint8)
    _launch(x, bias, slope, y, bits, packs=True)
    return y, bits


def _forward_alone(x: Tensor, bias: Tensor | None, slope: float, channels_last: bool) -> Tensor:
    x, y = _prepare("bias_leaky_relu", x, bias, channels_last)
    _launch(x, bias, slope, y, None, packs=True)
    return y


def _forward_fake(x: Tensor, bias: Tensor | None, slope: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    x, y = _prepare("bias_leaky_relu", x, bias, channels_last)
    return y, x.new_empty(_bytes(x), dtype=torch.uint8)


def _masked(g: Tensor, bias: Tensor | None, bits: Tensor, slope: float, channels_last: bool) -> Tensor:
    g, y = _prepare("bias_leaky_relu_masked", g, bias, channels_last, bits)
    _launch(g, bias, slope, y, bits)
    return y


def _masked_fake(g: Tensor, bias: Tensor | None, bits: Tensor, slope: float, channels_last: bool) -> Tensor:
    return _prepare("bias_leaky_relu_masked", g, bias, channels_last, bits)[1]


def _prepare_sums(g: Tensor, bits: Tensor, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    if g.dim() < 2:
        raise ValueError(f"bias_leaky_relu_backward: g must be [B, C, ...], got {list(g.shape)}")
    g, dx = _prepare("bias_leaky_relu_backward", g, None, channels_last, bits)
    return g, dx, g.new_empty(g.shape[1], dtype=accumulation_dtype(g.dtype))


def _backward(g: Tensor, bits: Tensor, slope: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    g, dx, dbias = _prepare_sums(g, bits, channels_last)
    _launch(g, None, slope, dx, bits, dbias=dbias)
    return dx, dbias


def _backward_fake(g: Tensor, bits: Tensor, slope: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    return _prepare_sums(g, bits, channels_last)[1:]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For the two ops that take a bias: the bits are input or output."""
    bias, ctx.slope, ctx.channels_last = inputs[1], *inputs[-2:]
    ctx.sums = bias is not None and bias.requires_grad
    ctx.save_for_backward(output[1] if isinstance(output, tuple) else inputs[2])


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
    (bits,) = ctx.saved_tensors
    if ctx.sums:
        return _op_backward(g, bits, ctx.slope, ctx.channels_last)
    return _op_masked(g, None, bits, ctx.slope, ctx.channels_last), None


def _forward_gradients(ctx: Any, g: Tensor, *unused: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, g), None, None


def _masked_gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return *_gradients(ctx, g), None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, bits, ctx.slope, ctx.channels_last = inputs
    ctx.save_for_backward(bits)


def _backward_gradients(ctx: Any, gg_dx: Tensor, gg_dbias: Tensor) -> tuple[Any, ...]:
    (bits,) = ctx.saved_tensors
    masked = _op_masked(gg_dx, gg_dbias, bits, ctx.slope, ctx.channels_last)
    return masked, None, None, None


def _mapped(count: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """Tensors with the mapped dimension in front (expanded where they have none), and everything else."""
    return [
        a if not isinstance(a, Tensor) else a.expand(count, *a.shape) if d is None else a.movedim(d, 0)
        for a, d in zip(args, in_dims, strict=True)
    ]


def _each(op: Callable[..., Any], count: int, args: list[Any]) -> list[Any]:
    return [op(*[a[i].contiguous() if isinstance(a, Tensor) else a for a in args]) for i in range(count)]


def _joins(x: Tensor, bias: Tensor | None, dim: int | None) -> bool:
    """Whether the mapped dimension may join the batch: samples fill whole bytes of bits and share the bias."""
    return x.dim() > 1 and math.prod(x.shape[1:]) % 8 == 0 and (bias is None or dim is None)


def _vmap_forward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    op, count, bias = torch.ops.gas_engine.bias_leaky_relu, info.batch_size, args[1]
    x, *rest = mapped = _mapped(count, in_dims, args)
    if _joins(x, bias, in_dims[1]):
        y, bits = op(x.flatten(0, 1), bias, *rest[1:])
        return (y.unflatten(0, x.shape[:2]), bits.reshape(count, -1)), (0, 0)
    ys, each_bits = zip(*_each(op, count, mapped), strict=True)
    return (torch.stack(ys), torch.stack(each_bits)), (0, 0)


def _vmap_masked(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    op, count, bias = torch.ops.gas_engine.bias_leaky_relu_masked, info.batch_size, args[1]
    g, _, bits, *rest = mapped = _mapped(count, in_dims, args)
    if _joins(g, bias, in_dims[1]):
        return op(g.flatten(0, 1), bias, bits.flatten(), *rest).unflatten(0, g.shape[:2]), 0
    return torch.stack(_each(op, count, mapped)), 0


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    op, count = torch.ops.gas_engine.bias_leaky_relu_backward, info.batch_size
    dx, dbias = zip(*_each(op, count, _mapped(count, in_dims, args)), strict=True)
    return (torch.stack(dx), torch.stack(dbias)), (0, 0)


_op = core.register(
    "bias_leaky_relu(Tensor x, Tensor? bias, float slope, bool channels_last) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_gradients,
    _setup,
    _vmap_forward,
    untaped=_forward_alone,
    first=True,
)
_op_masked = core.register(
    "bias_leaky_relu_masked(Tensor g, Tensor? bias, Tensor bits, float slope, bool channels_last) -> Tensor",
    _masked,
    _masked_fake,
    _masked_gradients,
    _setup,
    _vmap_masked,
)
_op_backward = core.register(
    "bias_leaky_relu_backward(Tensor g, Tensor bits, float slope, bool channels_last) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_gradients,
    _setup_backward,
    _vmap_backward,
)
