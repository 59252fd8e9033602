"""Finds the native core, decides between it and the twins, and holds what every op's wrapper needs.

The core (`gas_engine._native`, csrc/) does not know torch: Python owns allocation, devices and streams, and
hands over pointers and sizes. The checks here run before any pointer is taken.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch  # before the core, so that both share the OpenMP run-time that torch loads
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["LIBRARY", "MAX_STATES", "call", "direct", "native", "register", "runs_on"]

MAX_STATES = 64
LIBRARY = torch.library.Library("gas_engine", "DEF")

# The order of `enum class DType` in csrc/dtypes.h.
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# The order of `enum class Act` in csrc/activation.h.
ACTIVATIONS: dict[str, int] = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


def _load() -> ModuleType | None:
    """The extension module, or None where the twins shall run; then there is one warning."""
    why = "GAS_ENGINE_NATIVE=off"
    if os.environ.get("GAS_ENGINE_NATIVE", "").lower() != "off":
        try:
            return importlib.import_module("gas_engine._native")
        except ImportError as error:
            why = f"the native core is not there ({error}; build it with `pip install -e .`)"
    warnings.warn(f"gas_engine: {why}, so the slower pure-PyTorch twins of the ops run", RuntimeWarning, stacklevel=2)
    return None


native: ModuleType | None = _load()
_CUDA = bool(native and native.build_info()["cuda"]) and torch.version.hip is None


def runs_on(device: torch.device) -> bool:
    """Whether the registered op serves a call on this device.

    Else the twin does: without the core, on devices it has no kernels for (mps, xpu), and under forward-mode AD or
    torch.func.grad and jvp, which registered ops cannot follow; torch.func.vmap they can.
    """
    if native is None or transformed():
        return False
    return device.type == "cpu" or device.type == "meta" or (device.type == "cuda" and _CUDA)


def transformed() -> bool:
    """Whether somebody differentiates in another way than by the autograd tape."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    vmap = torch._C._functorch.TransformType.Vmap
    return forward_ad._current_level >= 0 or any(level.key() != vmap for level in stack)


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    vmap: Callable[..., Any] | None = None,
    keys: Sequence[str] = ("CPU", "CUDA"),
) -> Callable[..., Any]:
    """Make `gas_engine::<schema>` a torch op: its kernel for each of `keys`, fake, derivative and vmap rule.

    Without `backward` the op refuses to be differentiated, in one sentence, instead of giving zeros. Without `vmap`
    torch.func.vmap calls it once for every element of the mapped dimension.

    Returns what to call. In plain eager mode that goes past the dispatcher, whose layers for registered ops cost tens
    of microseconds, more than a small kernel: straight to the kernel, or, where a gradient is wanted, through an
    `autograd.Function` of the very same functions.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in keys:
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"gas_engine::{name}", fake, lib=LIBRARY)

    if "!" not in schema:  # an op that writes into its inputs has no derivative to register
        torch.library.register_autograd(
            f"gas_engine::{name}",
            backward or functools.partial(_refuse, name),
            setup_context=setup if backward else None,
            lib=LIBRARY,
        )
        torch.library.register_vmap(f"gas_engine::{name}", vmap or functools.partial(one_by_one, name), lib=LIBRARY)
    op = getattr(torch.ops.gas_engine, name)
    if "Tensor[]" in schema:  # the tape does not look into lists
        return op
    tape = None if backward is None or setup is None else _tape(name, kernel, backward, setup)

    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _observed():
            return op(*args)
        wanted = False
        for t in args:
            if isinstance(t, Tensor):
                if not _plain(t) or not _kernels_here(t.device):
                    return op(*args)
                wanted = wanted or t.requires_grad
        if not (wanted and torch.is_grad_enabled()):
            return kernel(*args)
        return op(*args) if tape is None else tape.apply(*args)

    return run


def _tape(name: str, kernel: Callable[..., Any], backward: Callable[..., Any], setup: Callable[..., None]) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup(ctx, args, output)
        return output

    # Named after the op: that is what anomaly mode and graph viewers show.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def batched(*tensors: Tensor) -> bool:
    """Whether one is a batch of cotangents (`grad` with is_grads_batched), which registered ops cannot follow."""
    return not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


def _refuse(name: str, ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError(f"gas_engine::{name} has no derivative of its own: call the twin of the public op")


def one_by_one(name: str, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The vmap rule that serves every op: a call for each element of the mapped dimension."""
    op = getattr(torch.ops.gas_engine, name)

    def pick(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, list | tuple) and isinstance(dim, list | tuple):
            return [pick(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    results = [op(*map(functools.partial(pick, i=i), args, in_dims)) for i in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def call(name: str, device: torch.device, *fields: Any) -> None:
    """Run the kernel `name` with the fields of its argument struct: here with torch's number of threads, or
    on the device's current stream."""
    assert native is not None
    if device.type == "cpu":
        getattr(native, name + "_cpu")(*fields, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        index, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
        error = getattr(native, name + "_cuda")(*fields, index, stream)
    if error:
        raise RuntimeError(f"gas_engine: a CUDA kernel was not launched: {error}")


def address(tensor: Tensor | None) -> int:
    """The tensor's first byte, or null."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(states: Sequence[Tensor]) -> tuple[list[int], list[int] | int]:
    """The `States` of csrc/dtypes.h."""
    codes = [DTYPES[s.dtype] for s in states]
    return [s.data_ptr() for s in states], codes


_PLAIN = (Tensor, torch.nn.Parameter)


def uniform(states: Sequence[Tensor], *more: Tensor) -> tuple[list[int], int] | None:
    """Addresses (of `more`, then of the states) and dtype code, where all are plain, contiguous tensors of one
    shape, dtype and device that only a kernel would see (no gradient, mode or transform).

    None for anything else, which the checks and layouts below then serve. This is what a small call pays.
    """
    if (type(states) is not list and type(states) is not tuple) or not 1 <= len(states) <= MAX_STATES:
        return None
    first = states[0]
    if type(first) not in _PLAIN:
        return None
    shape, dtype, device = first.shape, first.dtype, first.device
    code = DTYPES.get(dtype)
    if code is None or not _kernels_here(device) or torch.compiler.is_compiling() or _observed():
        return None
    graded, on_cpu = torch.is_grad_enabled(), device.type == "cpu"
    single = first.numel() == 1  # a pending negation is a view of every second number, contiguous only if it is one
    found = []
    for t in (*more, *states):
        if (
            type(t) not in _PLAIN
            or t.dtype is not dtype
            or t.shape != shape
            or not (t.is_cpu if on_cpu else t.device == device)
            or not t.is_contiguous()
            or (graded and t.requires_grad)
            or (single and t.is_neg())
        ):
            return None
        try:
            found.append(t.data_ptr())
        except RuntimeError:  # batched cotangents have no memory of their own
            return None
    return found, code


def _plain(tensor: Tensor) -> bool:
    """Whether the tensor is its memory: no subclass, no pending negation, no batch of cotangents (of `grad` with
    is_grads_batched, which is no transform that _observed sees)."""
    return type(tensor) in _PLAIN and not tensor.is_neg() and not torch._C._functorch.is_legacy_batchedtensor(tensor)


def constant(tensor: Tensor) -> bool:
    """Whether the tensor is plain, and no gradient is wanted of it."""
    return not (tensor.requires_grad and torch.is_grad_enabled()) and _plain(tensor)


def direct(*tensors: Tensor) -> bool:
    """Whether nothing but the native kernel would see the call: plain tensors, no gradient, mode or transform.

    Then a wrapper may skip the dispatcher, whose layers for autograd cost more than a small kernel does.
    """
    if torch.compiler.is_compiling() or _observed():
        return False
    return all([constant(t) for t in tensors]) and _kernels_here(tensors[0].device)


def _kernels_here(device: torch.device) -> bool:
    return native is not None and (device.type == "cpu" or (device.type == "cuda" and _CUDA))


def _observed() -> bool:
    """Whether somebody must see the op itself: a dispatch mode, a functorch transform, forward-mode AD, jit.trace, the
    profiler; true where torch does not tell."""
    try:
        return (
            torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None
            or torch.autograd._profiler_enabled()
        )
    except AttributeError:
        return True


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
    for name, weight in weights.items():
        if weight is not None and weight.requires_grad and torch.is_grad_enabled():
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


def coefficients(coef: Tensor, device: torch.device) -> Tensor:
    """Float64 on the states' device; a host tensor is copied without waiting for the device."""
    if coef.dtype == torch.float64 and coef.device == device:
        return coef
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
    if all([t.is_contiguous() for t in tensors]):
        return list(tensors), torch.contiguous_format
    other = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensors[0].dim())
    if other is not None and all(t.is_contiguous(memory_format=other) for t in tensors):
        return list(tensors), other
    return [t.contiguous() for t in tensors], torch.contiguous_format


def _describe(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} with {sorted({type(v).__name__ for v in value})}"
    return type(value).__name__
