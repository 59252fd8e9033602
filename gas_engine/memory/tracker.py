"""`ByteTracker`: live and peak bytes of tensors, counted by storage as the operations run, on any device.

It sees what crosses PyTorch's dispatcher: every result of an operation, whoever keeps it (a variable, the autograd
graph), until its storage dies. Scratch memory inside a kernel is not seen, nor what was there before. Fake tensors
give the same numbers as real ones, without memory or time.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

__all__ = ["ByteTracker", "Reading", "phase"]

_phases = ["other"]


class phase:
    """What is allocated inside belongs to `name` ("states", "network", "loss", ...) in every tracker at work.

    "host" is memory beside the device: it appears in `by_phase`, and neither in `live` nor in `peak`.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        _phases.append(self.name)

    def __exit__(self, *error: object) -> None:
        _phases.pop()


class Reading(NamedTuple):
    """What was alive after so many operations, and which phase had made it; `live` is without "host"."""

    operation: int
    live: int
    by_phase: dict[str, int]


class ByteTracker(TorchDispatchMode):
    """Counts the bytes of new storages, from their first tensor to their death.

    `live`, `peak`: bytes now and at most; `host`: bytes offloaded now. `by_phase`, `by_module`: who had made what was
    alive at the peak, by `phase` and by the innermost module whose forward made it (its name in `root`, or its class;
    "" outside of any, as in a backward pass). A view of older memory, such as the transpose of a weight, is no new
    byte. Storages that exist when the tracker starts are not counted.
    `cuda_peak`: bytes that CUDA's caching allocator had given out at most, above what it had at the start; 0 without a
    device. `timeline`: at most so many readings of `live` over the operations, each the highest of its stretch, so that
    the highest of all is the peak.

        with ByteTracker() as bytes:
            network(x).sum().backward()
        print(bytes.peak, bytes.by_phase)
    """

    def __init__(self, root: nn.Module | None = None, readings: int = 0) -> None:
        super().__init__()
        self._names = {id(m): name or type(m).__name__ for name, m in root.named_modules()} if root else {}
        self._inside: list[str] = []
        self._hooks: list[Any] = []
        self.live = 0
        self.peak = 0
        self.host = 0
        self.cuda_peak = 0
        self.by_phase: Counter[str] = Counter()
        self.by_module: Counter[str] = Counter()
        self.timeline: list[Reading] = []
        self._readings, self._operations, self._stretch = readings, 0, 1
        self._now: Counter[tuple[str, str]] = Counter()
        self._known: dict[int, weakref.finalize] = {}
        self._cuda_start = 0

    def __enter__(self) -> ByteTracker:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._cuda_start = torch.cuda.memory_allocated()
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        if torch.cuda.is_available():
            self.cuda_peak = torch.cuda.max_memory_allocated() - self._cuda_start
        for end in self._known.values():
            end.detach()
        self._known.clear()

    def reset_peak(self) -> None:
        """Count the peak from here on."""
        self.peak = 0
        self._mark()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        older = {_key(t) for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for t in _tensors(result):
            if _key(t) not in older:
                self._born(t)
        if self._readings:
            self._read()
        return result

    def _read(self) -> None:
        """Take a reading after an operation; where they become too many, of every two stretches one remains."""
        if len(self.timeline) == self._readings and self._operations % self._stretch == 0:
            pairs = zip(self.timeline[::2], [*self.timeline[1::2], self.timeline[-1]], strict=False)
            self.timeline = [max(pair, key=lambda reading: reading.live) for pair in pairs]
            self._stretch *= 2
        new = self._operations // self._stretch == len(self.timeline)
        if new or self.live > self.timeline[-1].live:
            by_phase: Counter[str] = Counter()
            for (name, _), size in self._now.items():
                by_phase[name] += size
            self.timeline[len(self.timeline) - (not new) :] = [Reading(self._operations, self.live, dict(by_phase))]
        self._operations += 1

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._inside.append(self._names.get(id(module), type(module).__name__))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()

    def _born(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._known:
            return
        owner = (_phases[-1], self._inside[-1] if self._inside else "")
        self._known[key] = weakref.finalize(storage, self._died, key, size, owner)
        self._now[owner] += size
        if owner[0] == "host":
            self.host += size
            return
        self.live += size
        self._mark()

    def _mark(self) -> None:
        if self.live <= self.peak:
            return
        self.peak = self.live
        self.by_phase, self.by_module = Counter(), Counter()
        for (name, module), size in self._now.items():
            self.by_phase[name] += size
            self.by_module[module] += size

    def _died(self, key: int, size: int, owner: tuple[str, str]) -> None:
        self._known.pop(key, None)
        if owner[0] == "host":
            self.host -= size
        else:
            self.live -= size
        self._now[owner] -= size
        if not self._now[owner]:
            del self._now[owner]


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Those with a storage: of a quantised weight, its parts."""
    for leaf in tree_leaves(tree):
        if is_traceable_wrapper_subclass(leaf):
            yield from _tensors([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif isinstance(leaf, Tensor):
            yield leaf


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata
