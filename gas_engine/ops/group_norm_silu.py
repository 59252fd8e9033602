"""`group_norm_silu`: GroupNorm, its modulation and the activation in one op that keeps only its input.

B batch, C channels, G groups, N pixels; x [B, C, *].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _native as core
from ._samples import Sample, draw
from .reference import accumulation_dtype, group_norm_silu_reference

__all__ = ["group_norm_silu", "group_norm_silu_samples"]


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """An activation of a modulated GroupNorm with frozen affine weights, which keeps x alone for its gradient.

    out = act(z (1 + scale) + shift);  z = n weight + bias;  n = (x - mean_g) / sqrt(var_g + eps), var biased
    (GroupNorm: arXiv 1803.08494; modulated as in ADM, arXiv 2105.05233, section 3.1, and EDM).

    Shapes and dtypes: x [B, C, *] of any rank >= 2, contiguous or channels_last (kept so), C a multiple of
    num_groups, float32, float64, bfloat16 or float16; weight, bias [C]; scale, shift [B, C] or [B, C, 1, ...];
    each optional, in any of these dtypes; act "silu", "gelu" (exact), "gelu_tanh" or "none". The result is like
    x. Arithmetic in float32, statistics in float64 over short float32 runs (on a GPU by Chan's updates), or all
    in float64 for float64; the same bits for every run and every number of threads.
    ERRORS_GO_HERE
    Differentiable once in x, scale and shift; weight and bias are constants here.
    Memory: keeps x, scale, shift and 2BG numbers for the gradient, where stock PyTorch keeps x, the norm's output
    and, modulated, the sum. On the CPU a group stays in the cache: the forward pass reads x and writes out once,
    the backward pass reads x and g and writes dx once; on a GPU 3 and 5 moves. Other layouts are copied first.
    Raises: ValueError (shapes, devices, act, weight or bias that want a gradient) or TypeError (dtypes).

        x, scale, shift = torch.randn(8, 64, 16, 16), *torch.randn(2, 8, 64)
        h = group_norm_silu(x, 32, norm.weight.detach(), norm.bias.detach(), scale=scale, shift=shift)
    """
    _check_public(x, num_groups, weight, bias)
    scale, shift = _per_channel(x, "scale", scale), _per_channel(x, "shift", shift)
    small = (weight, bias, scale, shift)
    if not core.runs_on(x.device):
        _check(x, num_groups, act, *small)
        return group_norm_silu_reference(x, num_groups, weight, bias, eps, scale, shift, act)
    tensors = [x, *[t for t in small if t is not None]]
    if not core.unobserved(*tensors):
        out: Tensor = torch.ops.gas_engine.group_norm_silu(x, num_groups, *small, eps, act)[0]
    elif torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        out = _GroupNormSilu.apply(x, num_groups, *small, eps, act)
    else:
        out = _group_norm_silu(x, num_groups, *small, eps, act)[0]
    return out


def _check_public(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"group_norm_silu: x must be a tensor [B, C, ...], got {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"group_norm_silu: x must be [B, C, ...], got {list(x.shape)}")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | torch.SymInt):
        raise TypeError(f"group_norm_silu: num_groups must be an integer, got {type(num_groups).__name__}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"group_norm_silu: {name} must be a tensor [C] or None, got {type(t).__name__}")
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(_FROZEN.format(name))


_FROZEN = (
    "group_norm_silu: {0} is a constant here but requires a gradient: freeze it ({0}.requires_grad_(False) or "
    ".detach()), pass what is trained as scale and shift, or call gas_engine.ops.group_norm_silu_reference"
)


def _per_channel(x: Tensor, name: str, t: Tensor | None) -> Tensor | None:
    """scale or shift as [B, C]: a view, so that its gradient finds the way back."""
    if t is None:
        return None
    if not isinstance(t, Tensor):
        raise TypeError(f"group_norm_silu: {name} must be a tensor [B, C] or None, got {type(t).__name__}")
    if t.dim() < 2 or t.shape[:2] != x.shape[:2] or any(n != 1 for n in t.shape[2:]):
        B, C = x.shape[:2]
        raise ValueError(f"group_norm_silu: {name} must be [{B}, {C}] or [{B}, {C}, 1, ...], got {list(t.shape)}")
    return t if t.dim() == 2 else t.flatten(1)


def _check(x: Tensor, num_groups: int, act: str, *small: Tensor | None) -> None:
    """What must hold before a pointer is taken, also for whoever calls `torch.ops.gas_engine`."""
    if x.dim() < 2:
        raise ValueError(f"group_norm_silu: x must be [B, C, ...], got {list(x.shape)}")
    if act not in core.ACTIVATIONS:
        raise ValueError(f"group_norm_silu: act must be one of {', '.join(core.ACTIVATIONS)}, got {act!r}")
    B, C = x.shape[:2]
    if num_groups < 1 or C % num_groups != 0:
        raise ValueError(f"group_norm_silu: num_groups must divide the channels, got {num_groups} for {C} channels")
    names = ("weight", "bias", "scale", "shift")
    for name, t, shape in zip(names, small, ((C,), (C,), (B, C), (B, C)), strict=True):
        if t is not None and t.shape != shape:
            raise ValueError(f"group_norm_silu: {name} must have shape {list(shape)}, got {list(t.shape)}")
        if t is not None and t.device != x.device:
            raise ValueError(f"group_norm_silu: all tensors must be on {x.device}, got {name} on {t.device}")
    for name, t in zip(("x", *names), (x, *small), strict=True):
        if t is not None and t.dtype not in core.DTYPES:
            raise TypeError(f"group_norm_silu: {name} must be float32, float64, bfloat16 or float16, got {t.dtype}")


def _layout(x: Tensor) -> torch.memory_format:
    """The layout the op works in: the input's own where it is dense."""
    other = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if other is not None and not x.is_contiguous() and x.is_contiguous(memory_format=other):
        return other
    return torch.contiguous_format


def _rows(t: Tensor | None) -> Tensor | None:
    """A small vector whose rows are dense: a half of `emb.chunk(2, dim=1)` may stay where it is."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _field(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (core.DTYPES[t.dtype], t.data_ptr())


def _chunks(B: int, C: int, N: int, G: int, last: bool, backward: bool) -> tuple[int, int, int]:
    """How the CUDA kernels split their sums, by sizes alone: (length of a chunk, chunks, sums in all)."""
    if last:  # over pixels, for each channel
        length = 64 if N * B * C < 2**24 else 256
        chunks = -(-N // length)
        return length, chunks, B * C * chunks
    span, rows = (N, B * C) if backward else (N * (C // G), B * G)  # over a channel, or over a group
    length = 1024 if span * rows < 2**24 else 4096
    chunks = -(-span // length)
    return length, chunks, rows * chunks


def _launch(
    op: str,
    x: Tensor,
    layout: torch.memory_format,
    num_groups: int,
    small: tuple[Tensor | None, ...],
    eps: float,
    act: str,
    statistics: tuple[Tensor, Tensor],
    *outputs: Tensor | None,
) -> None:
    """Run the kernel on a dense x; outputs are out, or dx, g, dscale, dshift."""
    if x.numel() == 0:
        return
    B, C = x.shape[:2]
    N = x.numel() // (B * C)
    last = layout != torch.contiguous_format or N == 1  # one pixel: both layouts are one, this one has vectors
    weight, bias, scale, shift = (_rows(t) for t in small)  # bound to names: their memory must outlive the call
    workspace, length, chunks = None, 0, 0  # the host path needs none
    if x.is_cuda:
        length, chunks, sums = _chunks(B, C, N, num_groups, last, op.endswith("backward"))
        workspace = statistics[0].new_empty(2 * (sums + B * num_groups))
    core.call(
        op,
        x.device,
        core.DTYPES[x.dtype],
        x.data_ptr(),
        *_field(weight),
        *_field(bias),
        *(*_field(scale), 0 if scale is None else scale.stride(0)),
        *(*_field(shift), 0 if shift is None else shift.stride(0)),
        core.ACTIVATIONS[act],
        eps,
        last,
        *(B, C, num_groups, N),
        *(length, chunks),
        core.address(workspace),
        *(t.data_ptr() for t in statistics),
        *(core.address(t) for t in (*outputs, None, None, None)[:4]),
    )


def _statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[0], num_groups), accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _forward_outputs(
    x: Tensor, num_groups: int, act: str, *small: Tensor | None
) -> tuple[torch.memory_format, Tensor, tuple[Tensor, Tensor]]:
    _check(x, num_groups, act, *small)
    layout = _layout(x)
    return layout, torch.empty_like(x, memory_format=layout), _statistics(x, num_groups)


def _group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    small = (weight, bias, scale, shift)
    layout, out, statistics = _forward_outputs(x, num_groups, act, *small)
    x = x.contiguous(memory_format=layout)
    _launch("group_norm_silu", x, layout, num_groups, small, eps, act, statistics, out)
    return out, *statistics


def _group_norm_silu_fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _, out, statistics = _forward_outputs(x, num_groups, act, weight, bias, scale, shift)
    return out, *statistics


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.num_groups, weight, bias, scale, shift, ctx.eps, ctx.act = inputs
    ctx.wanted = [t is not None and t.requires_grad for t in (x, scale, shift)]
    ctx.save_for_backward(x, *output[1:], weight, bias, scale, shift)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    for name, t in (("weight", inputs[2]), ("bias", inputs[3])):
        if t is not None and t.requires_grad:
            raise ValueError(_FROZEN.format(name))
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output)


def _backward(ctx: Any, g: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, mean, rstd, *small = ctx.saved_tensors
    # Batched cotangents (is_grads_batched) show in the tensor alone.
    here = core.direct(g, x) and not torch._C._functorch.is_legacy_batchedtensor(g)
    function: Any = _run_backward if here else torch.ops.gas_engine.group_norm_silu_backward
    grads = function(g, x, mean, rstd, ctx.num_groups, *small, ctx.eps, ctx.act, ctx.wanted)
    dx, dscale, dshift = (t if wanted else None for t, wanted in zip(grads, ctx.wanted, strict=True))
    return dx, None, None, None, dscale, dshift, None, None


class _GroupNormSilu(torch.autograd.Function):
    """The registered op without its dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _group_norm_silu(*inputs)
        _keep(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward)


def _gradients(
    g: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dscale and dshift, empty, where they are wanted."""
    if g.shape != x.shape:
        raise ValueError(f"group_norm_silu: its cotangent must have the shape {list(x.shape)}, got {list(g.shape)}")
    return (
        torch.empty_like(x, memory_format=_layout(x)) if wanted[0] else None,
        scale.new_empty(x.shape[:2]) if wanted[1] and scale is not None else None,
        shift.new_empty(x.shape[:2]) if wanted[2] and shift is not None else None,
    )


def _some(x: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What a registered op may return: no elements where nothing was wanted."""
    return tuple(x.new_empty(0) if t is None else t for t in grads)


def _run_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    act: str,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward kernel, on tensors that have been checked."""
    small = (weight, bias, scale, shift)
    dx, dscale, dshift = grads = _gradients(g, x, scale, shift, wanted)
    if x.numel() == 0:
        for t in grads:
            if t is not None:
                t.zero_()
        return grads
    layout = _layout(x)
    x, g = x.contiguous(memory_format=layout), g.to(x.dtype).contiguous(memory_format=layout)
    statistics = (mean.contiguous(), rstd.contiguous())
    _launch("group_norm_silu_backward", x, layout, num_groups, small, eps, act, statistics, dx, g, dscale, dshift)
    return grads


def _group_norm_silu_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, num_groups: int, *rest: Any
) -> tuple[Tensor, ...]:
    *small, _, act, _ = rest
    _check(x, num_groups, act, *small)
    return _some(x, _run_backward(g, x, mean, rstd, num_groups, *rest))


def _group_norm_silu_backward_fake(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    act: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    _check(x, num_groups, act, weight, bias, scale, shift)
    return _some(x, _gradients(g, x, scale, shift, wanted))


def _merged(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[V, B, ...] as [V B, ...], the mapped dimension being V; what is not mapped is repeated."""
    if t is None:
        return None
    return (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Both ops: the mapped dimension joins the batch."""
    backward = isinstance(args[1], Tensor)
    at = 5 if backward else 2  # of weight, bias
    if in_dims[at] is not None or in_dims[at + 1] is not None:
        raise NotImplementedError(
            "group_norm_silu: vmap over weight or bias is not there: map scale and shift, or call the twin"
        )
    size, constants = info.batch_size, (at - 1, at, at + 1)
    merged = [
        _merged(arg, in_dims[i], size) if isinstance(arg, Tensor) and i not in constants else arg
        for i, arg in enumerate(args)
    ]
    name = "group_norm_silu_backward" if backward else "group_norm_silu"
    results = getattr(torch.ops.gas_engine, name)(*merged)
    return tuple(r.unflatten(0, (size, -1)) if r.dim() > 1 else r.expand(size, 0) for r in results), (0,) * 3


core.register(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "float eps, str act) -> (Tensor, Tensor, Tensor)",
    _group_norm_silu,
    _group_norm_silu_fake,
    _backward,
    _setup,
    _vmap,
)
core.register(
    "group_norm_silu_backward(Tensor g, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
    "Tensor? bias, Tensor? scale, Tensor? shift, float eps, str act, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _group_norm_silu_backward,
    _group_norm_silu_backward_fake,
    vmap=_vmap,
)


def group_norm_silu_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """Odd sizes, every layout and activation, each optional vector on its own, groups of one number, nothing."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, layout: torch.memory_format = torch.contiguous_format, constant: bool = False) -> Tensor:
        return draw(generator, shape, dtype, device, requires_grad and not constant, layout)

    for C, N, groups in ((1, 1, 1), (3, 3, 1), (6, 129, 3), (2, 1134, 2), (129, 3, 43), (1134, 1, 9), (6, 0, 2)):
        scale, shift = new(2, C), new(2, C)
        affine = {"weight": new(C, constant=True), "bias": new(C, constant=True)}
        yield Sample((new(2, C, N), groups), {**affine, "scale": scale, "shift": shift})
    yield Sample((new(3, 8), 2), {"weight": new(8, constant=True), "act": "gelu"})
    yield Sample((new(3, 8), 8), {"shift": new(3, 8)})
    yield Sample((new(0, 8, 4, 4), 2), {"scale": new(0, 8)})
    for act in core.ACTIVATIONS:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = new(2, 12, 5, 7, layout=layout)
            yield Sample((x, 4), {"act": act, "scale": new(2, 12, 1, 1), "eps": 1e-3})
            yield Sample((x, 3), {"act": act, "shift": new(2, 12, 1, 1), "bias": new(12, constant=True)})
    x = new(2, 24, 3, 4, 5, layout=torch.channels_last_3d)
    yield Sample((x, 8), {"scale": new(2, 24), "shift": new(2, 24, 1, 1, 1)})
