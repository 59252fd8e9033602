"""Where frozen weights live: streamed from host memory block by block, or held in eight or four bits.

| | on the device | per network call |
|---|---|---|
| resident | all | |
| `stream_weights` | what is in no block, and three blocks | a copy of the blocks to the device, beside the arithmetic |
| `quantize_weights` | a byte, or a little more than half of one, a weight of linear layers | their dequantisation |
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._nf4 import NF4
from ._view import Forward, Make, made, view
from .blocks import repeated_blocks
from .tracker import phase

__all__ = ["quantisable", "quantize_weights", "stream_weights"]


def stream_weights(network: nn.Module, device: torch.device | str) -> nn.Module:
    """A view of a network in host memory that computes on ``device``, with the weights of its blocks brought there for
    each run of a block and dropped after it.

    The network's own weights stay where they are, page-locked in place for a CUDA device; what is in no block is copied
    to the device once. Same outputs and gradients bit for bit. A graph would keep the weights that it needs, so make
    ``checkpoint_blocks`` of the result: the backward pass then brings each block once more.

    Memory on the device: weights outside of blocks and three blocks: the one that runs, the one before, the next.
    Raises RuntimeError for trainable weights, ValueError where no block is found.

        small = checkpoint_blocks(stream_weights(network.requires_grad_(False), "cuda"))
    """
    device = torch.device(device)
    if network.__dict__.get("checkpointed"):
        raise ValueError(
            "stream_weights: the network's blocks are already rebuilt in the backward pass, and for that their weights "
            "must come anew; stream first: checkpoint_blocks(stream_weights(network, device))"
        )
    blocks = repeated_blocks(network)
    if not blocks:
        raise ValueError(f"stream_weights: no block was found in {type(network).__name__}, so nothing can be streamed")
    inside = {id(m) for block in blocks for m in block.modules()}
    conveyor, ids = _Conveyor(device), {id(block) for block in blocks}
    if device.type == "cuda":
        for block in blocks:
            for value in (*block.parameters(), *block.buffers()):
                _lock(value)

    def rule(module: nn.Module) -> Make | None:
        inner = made(module)
        return (lambda m: _Streamed(inner(m), m, conveyor)) if id(module) in ids else None

    result = view(network, rule, "stream_weights")
    originals = dict(network.named_modules())
    _move([m for name, m in result.named_modules() if id(originals[name]) not in inside], device)
    return result


def _move(modules: Iterable[nn.Module], device: torch.device | str) -> None:
    """Give the modules of a view tensors of their own on the device; `.to` would move those of the original."""
    for module in modules:
        both: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in both:
            for key, value in tensors.items():
                if value is not None:
                    moved = value.detach().to(device)
                    tensors[key] = (
                        nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved
                    )


class _Conveyor:
    """Brings the weights of blocks, and sends ahead for those that came next the last time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: tuple[_Streamed | None, _Streamed | None] = (None, None)
        self.follows: dict[tuple[_Streamed | None, _Streamed | None], _Streamed] = {}
        self.ahead: tuple[_Streamed, list[Tensor]] | None = None
        self.before: torch.cuda.Event | None = None  # all that was asked of the device before the last block

    def bring(self, block: _Streamed) -> list[Tensor]:
        ahead, self.ahead = self.ahead, None
        here = ahead[1] if ahead is not None and ahead[0] is block else self.copy(block)
        del ahead
        self.follows[self.last] = block
        self.last = (self.last[1], block)
        if self.stream is None:
            return here
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for value in here:
            value.record_stream(current)
        # A host that runs far ahead of the device would send for block after block.
        if self.before is not None:
            self.before.synchronize()
        self.before = current.record_event()
        if (following := self.follows.get(self.last)) is not None:
            self.ahead = (following, self.copy(following))
        return here

    def copy(self, block: _Streamed) -> list[Tensor]:
        with phase("weights"):
            if self.stream is None:
                return [home.detach().clone() for _, _, home in block.homes]
            with torch.cuda.stream(self.stream):
                return [home.detach().to(self.device, non_blocking=True) for _, _, home in block.homes]


class _Streamed:
    """The forward of a block whose weights come and go."""

    def __init__(self, forward: Forward, module: nn.Module, conveyor: _Conveyor) -> None:
        self.forward, self.conveyor = forward, conveyor
        self.homes: list[tuple[dict[str, Any], str, Tensor]] = [
            (tensors, key, value)
            for m in module.modules()
            for tensors in (m._parameters, m._buffers)
            for key, value in tensors.items()
            if value is not None
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for (tensors, key, home), value in zip(self.homes, self.conveyor.bring(self), strict=True):
            tensors[key] = nn.Parameter(value, requires_grad=False) if isinstance(home, nn.Parameter) else value
        del value
        try:
            return self.forward(*args, **kwargs)
        finally:
            for tensors, key, home in self.homes:
                tensors[key] = home


def _lock(value: Tensor) -> None:
    """Page-lock a host tensor in place until it dies, so that copies from it need not wait; where the system refuses
    (files mapped read-only, a limit on locked memory), they do."""
    if value.device.type != "cpu" or not value.numel() or value.is_pinned():
        return
    storage, runtime = value.untyped_storage(), torch.cuda.cudart()
    if int(runtime.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)) == 0:
        weakref.finalize(storage, runtime.cudaHostUnregister, storage.data_ptr())
        return
    with contextlib.suppress(RuntimeError):  # the refusal would be told at the next launch, and nowhere else
        torch.zeros(1, device="cuda").add_(1)


def quantize_weights(network: nn.Module, device: torch.device | str | None = None, kind: str = "int8") -> nn.Module:
    """A view whose blocks' linear layers hold their weights in eight or four bits, on ``device``.

    | kind | format | bytes a weight | error of a weight |
    |---|---|---|---|
    | "int8" | a scale for each row (torchao) | 1 | 0.8 % |
    | "nf4" | 16 values, a scale for every 64 numbers (arXiv 2305.14314) | 0.5625 | 9 % |

    An approximation of the network; its gradients are exactly those of what it computes. Embeddings (of time, classes
    and text), norms, convolutions and what is in no block stay as they are; where no block is found, every linear layer
    counts. No graph keeps dequantised weights, of int8 after ``lean``. Memory beside the above: one dequantised layer
    at a time; the original may be dropped.
    Raises ValueError for another kind, RuntimeError for trainable weights, ValueError for int8 without torchao.

        small = lean(quantize_weights(network.requires_grad_(False), "cuda", "nf4"))
    """
    if kind not in ("int8", "nf4"):
        raise ValueError(f"weights are quantised to int8 or nf4, got {kind!r}")
    result = view(network, lambda module: None, "quantize_weights")
    chosen = {id(layer): layer for layer in quantisable(result)}
    if kind == "nf4":
        for layer in chosen.values():
            weight = NF4.of(layer.weight if device is None else layer.weight.to(device))
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    else:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise ValueError(f"int8 weights need torchao ({error}): pip install torchao") from None
        config = Int8WeightOnlyConfig(set_inductor_config=False)  # or it slows every compilation of the process down
        quantize_(result, config, filter_fn=lambda module, name: id(module) in chosen)
    if device is not None:
        _move(result.modules(), device)
    return result


def quantisable(network: nn.Module) -> list[nn.Linear]:
    """The linear layers whose weights ``quantize_weights`` packs."""
    inside = {id(m) for block in repeated_blocks(network) for m in block.modules()}
    return [
        module
        for name, module in network.named_modules()
        if type(module) is nn.Linear and (not inside or (id(module) in inside and "emb" not in name))
    ]
