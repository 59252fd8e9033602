"""`group_norm_silu`: GroupNorm, its modulation and the activation in one op that keeps only its input.

B batch, C channels, G groups, N pixels; x [B, C, *].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _group_norm
from . import _native as core
from .reference import group_norm_silu_reference

__all__ = ["group_norm_silu"]


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
    Error against the float64 twin at [4, 128, 32, 32], 32 groups, modulated, relative L2 (bias over norm): the result
    float32 7.5e-8 (< 1e-8), float64 2e-16 (< 1e-17), dx 1.1e-7 and 5e-16 (likewise), dscale and dshift 1.5e-7 (< 4e-8)
    and 5e-16 (< 1e-16), in channels_last 3e-7 and 9e-16; all of them in bfloat16 1.7e-3 and in float16 2.1e-4 (the
    rounding of each; < 5e-6 and < 2e-6, of dscale and dshift < 2e-4 and < 2e-5).
    Differentiable once in x, scale and shift; weight and bias are constants here.
    Memory: keeps x, scale, shift and 2BG numbers for the gradient, where stock PyTorch keeps x, the norm's output
    and, modulated, the sum. On the CPU a group stays in the cache: the forward pass reads x and writes out once,
    the backward pass reads x and g and writes dx once; on a GPU 3 and 5 moves. Other layouts are copied first.
    Raises: ValueError (shapes, devices, act), TypeError (dtypes), RuntimeError (weight or bias that want a gradient).

        x, scale, shift = torch.randn(8, 64, 16, 16), *torch.randn(2, 8, 64)
        h = group_norm_silu(x, 32, norm.weight.detach(), norm.bias.detach(), scale=scale, shift=shift)
    """
    _check_public(x, num_groups, weight, bias)
    scale, shift = _per_channel(x, "scale", scale), _per_channel(x, "shift", shift)
    small = (weight, bias, scale, shift)
    if not core.runs_on(x):
        _group_norm.check(x, num_groups, act, *small)
        return group_norm_silu_reference(x, num_groups, weight, bias, eps, scale, shift, act)
    out: Tensor = _op(x, num_groups, *small, eps, act)
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
    checks.check_frozen("group_norm_silu", weight=weight, bias=bias)


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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.num_groups, weight, bias, scale, shift, ctx.eps, ctx.act = inputs
    checks.check_constant("group_norm_silu", weight=weight, bias=bias)
    ctx.wanted = [t is not None and t.requires_grad for t in (x, scale, shift)]
    ctx.save_for_backward(x, *output[1:], weight, bias, scale, shift)


def _backward(ctx: Any, g: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, mean, rstd, *small = ctx.saved_tensors
    args: tuple[Any, ...] = (g, x, mean, rstd, ctx.num_groups, *small, ctx.eps, ctx.act, ctx.wanted)
    if _is_spare(x, g):
        x.untyped_storage()._spare = False  # type: ignore[attr-defined]  # from here on it is the gradient's
        return _spread(_group_norm.gradients(*args, x))  # type: ignore[call-arg]
    grads = _op_backward(*args)
    dx, dscale, dshift = (t if wanted else None for t, wanted in zip(grads, ctx.wanted, strict=True))
    return _spread((dx, dscale, dshift))


def _spread(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    dx, dscale, dshift = grads
    return dx, None, None, None, dscale, dshift, None, None


def spare(x: Tensor) -> Tensor:
    """Say of a tensor, unpacked for one backward step alone, that its memory may take the gradient."""
    x.untyped_storage()._spare = True  # type: ignore[attr-defined]  # autograd hands out another tensor of it
    return x


def _is_spare(x: Tensor, g: Tensor) -> bool:
    if not getattr(x.untyped_storage(), "_spare", False) or torch.is_grad_enabled() or core.is_compiling():
        return False
    plain = all(type(t) is Tensor or isinstance(t, torch._subclasses.FakeTensor) for t in (x, g))
    dense = x.is_contiguous(memory_format=core.layout(x))
    return plain and dense and core.runs_on(x) and not core.batched(g) and x.dtype == g.dtype


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


_op = core.register(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "float eps, str act) -> (Tensor, Tensor, Tensor)",
    _group_norm.forward,
    _group_norm.forward_fake,
    _backward,
    _setup,
    _vmap,
    untaped=_group_norm.forward_alone,
    first=True,
)
_op_backward = core.register(
    "group_norm_silu_backward(Tensor g, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
    "Tensor? bias, Tensor? scale, Tensor? shift, float eps, str act, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _group_norm.backward,
    _group_norm.backward_fake,
    vmap=_vmap,
    untaped=_group_norm.gradients,
)
