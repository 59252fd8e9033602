"""Finds the native core, decides between it and the twins, and holds what every op's wrapper needs.

The core (`gas_engine._native`, csrc/) does not know torch: Python owns allocation, devices and streams, and
hands over pointers and sizes. The checks here run before any pointer is taken.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch  # before the core, so that both share the OpenMP run-time that torch loads
from torch import Tensor

__all__ = ["LIBRARY", "MAX_STATES", "launch", "native", "runs_on"]

MAX_STATES = 64
LIBRARY = torch.library.Library("gas_engine", "DEF")

# The order of `enum class DType` in csrc/dtypes.h.
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _load() -> ModuleType | None:
    """The extension module, or None where the twins shall run (with one warning if nobody asked for that)."""
    if os.environ.get("GAS_ENGINE_NATIVE", "").lower() == "off":
        return None
    try:
        _native = importlib.import_module("gas_engine._native")
    except ImportError as error:
        warnings.warn(
            f"gas_engine: the native core is not there ({error}), so the slower pure-PyTorch twins run: "
            "build it with `pip install -e .`, or set GAS_ENGINE_NATIVE=off to say that this is wanted",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _native


native: ModuleType | None = _load()
_CUDA = bool(native and native.build_info()["cuda"]) and torch.version.hip is None


def runs_on(device: torch.device) -> bool:
    """Whether the native ops serve tensors of this device (else the twins do, e.g. on mps or xpu)."""
    if native is None:
        return False
    return device.type == "cpu" or device.type == "meta" or (device.type == "cuda" and _CUDA)


def check_list(op: str, name: str, states: Sequence[Tensor]) -> None:
    """Refuse anything but a list of 1..64 tensors: what the dispatcher would refuse less readably."""
    if not isinstance(states, list | tuple) or not all(isinstance(s, Tensor) for s in states):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {_describe(states)}")
    if not 1 <= len(states) <= MAX_STATES:
        raise ValueError(f"{op}: {name} must hold 1 to {MAX_STATES} tensors, got {len(states)}")


def check_states(op: str, name: str, states: Sequence[Tensor], like: Tensor | None = None) -> None:
    """Refuse all but 1..64 tensors of one shape, device and floating dtype, saying what was seen."""
    if not 1 <= len(states) <= MAX_STATES:
        raise ValueError(f"{op}: {name} must hold 1 to {MAX_STATES} tensors, got {len(states)}")
    first = states[0] if like is None else like
    shape, dtype, device = first.shape, first.dtype, first.device
    if dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {dtype}")
    for i, s in enumerate(states):
        if s.shape != shape:
            raise ValueError(
                f"{op}: all tensors must have one shape, got {name}[{i}] {list(s.shape)} beside {list(shape)}"
            )
        if s.dtype != dtype:
            raise TypeError(f"{op}: all tensors must have one dtype, got {name}[{i}] {s.dtype} beside {dtype}")
        if s.device != device:
            raise ValueError(f"{op}: all tensors must be on one device, got {name}[{i}] on {s.device} beside {device}")


def check_coef(op: str, name: str, coef: Tensor, length: int) -> None:
    """Refuse a coefficient vector that is not a floating tensor of shape [length]."""
    if not isinstance(coef, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of shape [{length}], got {type(coef).__name__}")
    if not coef.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating tensor, got {coef.dtype}")
    if tuple(coef.shape) != (length,):
        raise ValueError(f"{op}: {name} must have shape [{length}], one number per state, got {list(coef.shape)}")


def coefficients(coef: Tensor, device: torch.device) -> Tensor:
    """Float64 on the states' device; a host tensor is copied without waiting for the device."""
    return coef.to(device=device, dtype=torch.float64, non_blocking=True)


def check_raw(op: str, states: Sequence[Tensor], *coefs: Tensor) -> None:
    """What the public wrappers have done, for whoever calls `torch.ops.gas_engine`: float64, same device."""
    for coef in coefs:
        if coef.dtype != torch.float64 or coef.device != states[0].device:
            raise ValueError(
                f"{op}: coefficients must be float64 on {states[0].device}, got {coef.dtype} on "
                f"{coef.device}; call gas_engine.ops, which converts them"
            )


def one_layout(tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.memory_format]:
    """The tensors in one dense element order (channels_last stays so), copied only where they disagree."""
    formats = [torch.contiguous_format]
    if tensors[0].dim() == 4:
        formats.append(torch.channels_last)
    elif tensors[0].dim() == 5:
        formats.append(torch.channels_last_3d)
    for layout in formats:
        if all(t.is_contiguous(memory_format=layout) for t in tensors):
            return list(tensors), layout
    return [t.contiguous() for t in tensors], torch.contiguous_format


def direct(*tensors: Tensor) -> bool:
    """Whether nothing but the native kernel would see the call: plain tensors, no gradient, mode or transform.

    Then a wrapper may skip the dispatcher, whose layers for autograd cost more than a small kernel does.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _observed():
        return False
    return all(type(t) is Tensor and not t.is_neg() for t in tensors) and (
        native is not None and (tensors[0].is_cpu or (tensors[0].is_cuda and _CUDA))
    )


def _observed() -> bool:
    """Whether a dispatch mode or a functorch transform is active; true where torch does not tell."""
    try:
        modes, transform = torch._C._len_torch_dispatch_stack(), torch._C._functorch.peek_interpreter_stack()
    except AttributeError:
        return True
    return modes > 0 or transform is not None


def launch(kernel: Callable[..., str], args: tuple[Any, ...], device: torch.device) -> None:
    """Queue a kernel on the device's current stream; its error message, if any, becomes an exception."""
    with torch.cuda.device(device):
        error = kernel(*args, torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"gas_engine: a CUDA kernel was not launched: {error}")


def _describe(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} with {sorted({type(v).__name__ for v in value})}"
    return type(value).__name__
