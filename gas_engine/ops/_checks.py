"""What the ops refuse, each in one sentence that says what was seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "DTYPES", "MAX_STATES", "check_coef", "check_constant", "check_frozen", "check_list", "check_raw", "check_states",
]  # fmt: skip

MAX_STATES = 64
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def check_list(op: str, name: str, states: Sequence[Tensor]) -> None:
    """Refuse anything but a list of 1..64 tensors: what the dispatcher would refuse less readably."""
    if not isinstance(states, list | tuple) or not all(isinstance(s, Tensor) for s in states):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {_describe(states)}")
    if not 1 <= len(states) <= MAX_STATES:
        raise ValueError(f"{op}: {name} must hold 1 to {MAX_STATES} tensors, got {len(states)}")


def check_states(op: str, name: str, states: Sequence[Tensor], like: Tensor | None = None) -> None:
    """Refuse all but 1..64 tensors of one shape and device, each of a known dtype, saying what was seen."""
    if not 1 <= len(states) <= MAX_STATES:
        raise ValueError(f"{op}: {name} must hold 1 to {MAX_STATES} tensors, got {len(states)}")
    first = states[0] if like is None else like
    shape, device = first.shape, first.device
    for s in states:
        if s.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {s.dtype}")
        if s.shape != shape:
            raise ValueError(f"{op}: all tensors must have one shape, got {name} {list(s.shape)} beside {list(shape)}")
        if s.device != device:
            raise ValueError(f"{op}: all tensors must be on one device, got {name} on {s.device} beside {device}")


def check_frozen(op: str, **weights: Tensor | None) -> None:
    """Refuse weights that want a gradient: an op that keeps no input has none to give."""
    if torch.is_grad_enabled():
        check_constant(op, **weights)


def check_constant(op: str, **weights: Tensor | None) -> None:
    """The same where the tape records the op, which it does with gradients switched off."""
    for name, weight in weights.items():
        if weight is not None and weight.requires_grad:
            raise RuntimeError(
                f"{op}: {name} wants a gradient, and this op keeps nothing to make one from: freeze it with "
                f"{name}.requires_grad_(False), or call the twin gas_engine.ops.{op}_reference"
            )


def check_coef(op: str, name: str, coef: Tensor, length: int) -> None:
    """Refuse a coefficient vector that is not a floating tensor of shape [length]."""
    if not isinstance(coef, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of shape [{length}], got {type(coef).__name__}")
    if not coef.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating tensor, got {coef.dtype}")
    if coef.shape != (length,):
        raise ValueError(f"{op}: {name} must have shape [{length}], one number per state, got {list(coef.shape)}")


def check_raw(op: str, states: Sequence[Tensor], *coefs: Tensor) -> None:
    """What the public wrappers have done, for whoever calls `torch.ops.gas_engine`: float64, same device."""
    for coef in coefs:
        if coef.dtype != torch.float64 or coef.device != states[0].device:
            raise ValueError(
                f"{op}: coefficients must be float64 on {states[0].device}, got {coef.dtype} on "
                f"{coef.device}; call gas_engine.ops, which converts them"
            )


def _describe(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} with {sorted({type(v).__name__ for v in value})}"
    return type(value).__name__
