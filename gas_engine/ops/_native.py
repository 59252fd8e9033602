"""Finds the native core, decides between it and the twins, and holds what every op's wrapper needs.

The core (`gas_engine._native`, csrc/) does not link torch: Python owns allocation, devices and streams, and hands
over tensors (read through DLPack) and sizes, once `_checks` has let them pass.
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

__all__ = ["LIBRARY", "direct", "kernel", "native", "register", "runs_on"]

LIBRARY = torch.library.Library("gas_engine", "DEF")

# The order of `enum class Act` in csrc/activation.h.
ACTIVATIONS: dict[str, int] = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
# What dense tensors may be besides contiguous.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _load() -> ModuleType | None:
    """The extension module, or None where the twins shall run; then there is one warning."""
    why = "GAS_ENGINE_NATIVE=off"
    if os.environ.get("GAS_ENGINE_NATIVE", "").lower() != "off":
        try:
            core = importlib.import_module("gas_engine._native")
            core.bind(Tensor, torch.nn.Parameter)
            return core
        except (ImportError, AttributeError) as error:  # AttributeError: built for other sources, or another torch
            why = f"the native core is not there ({error}; build it with `pip install -e .`)"
    warnings.warn(f"gas_engine: {why}, so the slower pure-PyTorch twins of the ops run", RuntimeWarning, stacklevel=2)
    return None


native: ModuleType | None = _load()
_CUDA = bool(native and native.build_info()["cuda"]) and torch.version.hip is None


def runs_on(x: Tensor) -> bool:
    """Whether the registered op serves a call on this tensor's device.

    Else the twin does: without the core, on devices it has no kernels for (mps, xpu), and under forward-mode AD or
    torch.func.grad and jvp, which registered ops cannot follow; torch.func.vmap they can.
    """
    return native is not None and not transformed() and (x.is_cpu or x.is_meta or (x.is_cuda and _CUDA))


def transformed() -> bool:
    """Whether somebody differentiates in another way than by the autograd tape."""
    if is_compiling():
        return False
    if _transform() is None:
        return forward_ad._current_level >= 0
    vmap = torch._C._functorch.TransformType.Vmap
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() != vmap for level in stack)


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    vmap: Callable[..., Any] | None = None,
    untaped: Callable[..., Any] | None = None,
    first: bool = False,
    keys: Sequence[str] = ("CPU", "CUDA"),
) -> Callable[..., Any]:
    """Make `gas_engine::<schema>` a torch op: its kernel for each of `keys`, fake, derivative and vmap rule.

    Without `backward` the op refuses to be differentiated, in one sentence, instead of giving zeros. Without `vmap`
    torch.func.vmap calls it once for every element of the mapped dimension.

    Returns what to call. In plain eager mode that goes past the dispatcher, whose layers for registered ops cost tens
    of microseconds, more than a small kernel: straight to the kernel, or, where a gradient is wanted, through an
    `autograd.Function` of the very same functions. Where all outputs but the `first` are there for the backward pass
    only, it gives the first one. `untaped` stands for the kernel where neither dispatcher nor tape see the call: it may
    leave out what nobody asks for.
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
            setup_context=_first_differs(setup) if first and backward else setup if backward else None,
            lib=LIBRARY,
        )
        torch.library.register_vmap(f"gas_engine::{name}", vmap or functools.partial(one_by_one, name), lib=LIBRARY)
    op = getattr(torch.ops.gas_engine, name)
    if "Tensor[]" in schema:  # the tape does not look into lists
        return op
    tape = op if backward is None or setup is None else _tape(name, kernel, backward, setup, first)

    def run(*args: Any) -> Any:
        taped = seen_by_tape(*args)
        if taped is None:
            return op(*args)[0] if first else op(*args)
        return tape(*args) if taped else bare(*args)

    bare = untaped or kernel
    return run


def _first_differs(setup: Any) -> Any:
    """`setup` for the dispatcher, which gives all outputs: the first alone is differentiable."""

    def mark(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        setup(ctx, inputs, output)

    return mark


def _tape(
    name: str, kernel: Callable[..., Any], backward: Callable[..., Any], setup: Callable[..., None], first: bool
) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup(ctx, args, output)
        return output[0] if first else output

    # Named after the op: that is what anomaly mode and graph viewers show.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]


def batched(*tensors: Tensor) -> bool:
    """Whether one is a batch of cotangents (`grad` with is_grads_batched), which registered ops cannot follow."""
    return not is_compiling() and any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


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


def _stream(device: int) -> int:
    """The address of the device's current stream; the public way to it costs more than a launch."""
    return torch._C._cuda_getCurrentRawStream(device)


def kernel(name: str) -> Callable[..., None]:
    """What runs the core's kernel `name` on the device of its first argument, with the fields of its argument struct:
    here with torch's number of threads, or on the device's current stream."""
    on_cpu: Any
    on_cuda: Any
    on_cpu, on_cuda = (getattr(native, name + where, None) for where in ("_cpu", "_cuda"))

    def run(like: Tensor, *fields: Any) -> None:
        if like.is_cpu:
            on_cpu(*fields, torch.get_num_threads())
            return
        device = like.get_device()
        error = on_cuda(*fields, device, _stream(device))
        if error:
            raise RuntimeError(f"gas_engine: a CUDA kernel was not launched: {error}")

    return run


def seen_by_tape(*args: Any) -> bool | None:
    """Whether a call with these arguments is for the autograd tape to see; None where it is for the dispatcher.

    The dispatcher must see subclasses, pending negations, batches of cotangents (of `grad` with is_grads_batched),
    other devices, and whatever `_observed` tells of; its layers cost more than a small kernel.
    """
    if native is None or is_compiling() or _observed():
        return None
    wanted: bool | None = native.plain(*args)
    return wanted and torch.is_grad_enabled()


def direct(*args: Any) -> bool:
    """Whether nothing but the native kernel would see the call."""
    return seen_by_tape(*args) is False


def uniform(states: Sequence[Tensor], more: tuple[Tensor, ...] = (), others: tuple[Tensor, ...] = ()) -> bool:
    """Whether a call is `direct`, and the states, a list or tuple of 1 to 64, and `more` are contiguous and of one
    shape, floating dtype and device.

    Anything else is served by the checks and layouts below. This is what a small call pays.
    """
    if native is None or is_compiling() or _observed():
        return False
    wanted: bool | None = native.uniform(states, more, others)
    return wanted is False or (wanted is True and not torch.is_grad_enabled())


# Asked at every call, and so looked up once; where torch does not tell, the answer is yes.
is_compiling = torch.compiler.is_compiling
_transform = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_tracing = getattr(torch._C, "_get_tracing_state", lambda: True)
_profiling = getattr(torch.autograd, "_profiler_enabled", lambda: True)


def _observed() -> bool:
    """Whether somebody must see the op itself: a dispatch mode, a functorch transform, forward-mode AD, jit.trace, the
    profiler."""
    return (
        _dispatch_modes() > 0
        or _transform() is not None
        or forward_ad._current_level >= 0
        or _tracing() is not None
        or _profiling()
    )


def coefficients(coef: Tensor, device: torch.device) -> Tensor:
    """Float64 on the states' device; a host tensor is copied without waiting for the device."""
    if coef.dtype == torch.float64 and coef.device == device:
        return coef
    return coef.to(device=device, dtype=torch.float64, non_blocking=True)


def layout(x: Tensor) -> torch.memory_format:
    """The dense layout of x, contiguous if it has none (batched tensors of vmap do not tell)."""
    other = CHANNELS_LAST.get(x.dim())
    if other is None or x.is_contiguous() or torch._C._functorch.is_batchedtensor(x):
        return torch.contiguous_format
    return other if x.is_contiguous(memory_format=other) else torch.contiguous_format


def one_layout(tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.memory_format]:
    """The tensors in one dense element order (channels_last stays so), copied only where they disagree."""
    if all([t.is_contiguous() for t in tensors]):
        return list(tensors), torch.contiguous_format
    other = CHANNELS_LAST.get(tensors[0].dim())
    if other is not None and all(t.is_contiguous(memory_format=other) for t in tensors):
        return list(tensors), other
    return [t.contiguous() for t in tensors], torch.contiguous_format
