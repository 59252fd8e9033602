"""One call of one block: what it keeps, and how the rest is made again in the backward pass.

A frame keeps its arguments, or the promise that the block before, of which an argument is the result, makes it again.
Frames that wait for each other are a row: the first, at place 0, keeps all of its arguments.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from ._rebuilt import as_autocast, autocast_state
from ._view import Forward


class _Saved:
    """What one operation of a block had saved, or the promise of it."""

    __slots__ = ("__weakref__", "frame", "tensor", "version")

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.tensor: Tensor | None = None

    def keep(self, t: Tensor) -> None:
        self.tensor, self.version = t, t._version

    def fetch(self) -> Tensor:
        if self.tensor is None:
            self.frame.rebuild()
        assert self.tensor is not None
        if self.tensor._version != self.version:
            raise RuntimeError("checkpoint_blocks: a block changed a tensor in place that its gradient needs")
        return self.tensor


def _nothing() -> None:
    """A weak reference to what is not there yet."""


class _Result:
    """What is known of a tensor that a block returned, for the blocks that take it as an argument.

    ``kept``: the data, where a frame keeps it. ``waiting``: the promise of it, where one was given.
    """

    def __init__(self, frame: Frame, index: int, version: int) -> None:
        self.frame, self.index, self.version = weakref.ref(frame), index, version
        self.kept: Callable[[], Tensor | None] = _nothing
        self.waiting: Callable[[], _Promise | None] = _nothing


class _Promise:
    """An argument that is kept nowhere: what the frame before returns when it runs again."""

    def __init__(self, frame: Frame, result: _Result) -> None:
        self.frame, self.result = frame, result
        self.tensor: Tensor | None = None
        self.version = result.version

    def keep(self, t: Tensor) -> None:
        self.tensor, self.version = t, t._version

    def fetch(self) -> Tensor:
        self.tensor = self.tensor if self.tensor is not None else self.result.kept()
        if self.tensor is None:
            self.frame.run_again()
        assert self.tensor is not None
        if self.tensor._version != self.version:
            raise RuntimeError(_CHANGED)
        return self.tensor


_CHANGED = "checkpoint_blocks: an input of a block was changed in place after the block had run"


class Newest:
    """The block that ran last, and what the blocks of a view returned.

    ``keep``: its inside stays until another one starts. ``row``: at most so many blocks, of which the first alone
    keeps its arguments.
    """

    def __init__(self, keep: bool, row: int = 1) -> None:
        self.keep, self.row = keep, row
        self.frame: Callable[[], Frame | None] = _nothing
        self.results: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, frame: Frame) -> None:
        previous = self.frame()
        if self.keep and previous is not None:
            previous.drop()
        self.frame = weakref.ref(frame)


class _Stop(Exception):
    pass


_rebuilding: list[set[int] | None] = [None]


def rebuilding(*weights: Tensor | None) -> bool:
    """Whether a block runs for what its operations save alone, and stops before it returns a value; and these are
    weights of its own, which count as nothing saved. Weights that come and go are none."""
    own = _rebuilding[-1]
    return own is not None and all(w is None or w.untyped_storage()._cdata in own for w in weights)


class Frame:
    """One call of one block, and what its operations save, which is kept or rebuilt."""

    def __init__(
        self, forward: Forward, weights: Sequence[Tensor], leaves: Sequence[Any], spec: TreeSpec, newest: Newest
    ) -> None:
        self.forward, self.spec, self.place = forward, spec, 0
        self.leaves = [self._kept(t, newest) if isinstance(t, Tensor) else t for t in leaves]
        self.wanted = [isinstance(t, Tensor) and t.requires_grad for t in leaves]
        self.versions = _versions(self.leaves)
        self.weights = {w.untyped_storage()._cdata for w in weights}
        self.saved: list[tuple[weakref.ref[_Saved], torch.Size, torch.dtype]] = []
        self.results: list[weakref.ref[_Result]] = []
        self.autocast = autocast_state(next(t.device.type for t in leaves if isinstance(t, Tensor)))

    def _kept(self, t: Tensor, newest: Newest) -> Tensor | _Promise:
        """The argument, or a promise of it from the frame before, if it is not the last of its row."""
        result: _Result | None = newest.results.get(t) if newest.row > 1 else None
        if result is None or result.version != t._version:
            return t.detach()
        kept, maker = result.kept(), result.frame()
        if kept is None and maker is not None and maker is newest.frame() and maker.place + 1 < newest.row:
            self.place = maker.place + 1
            promise = result.waiting() or _Promise(maker, result)
            result.waiting = weakref.ref(promise)
            return promise
        kept = t.detach() if kept is None else kept
        result.kept = weakref.ref(kept)
        return kept

    def arguments(self) -> list[Any]:
        """The leaves, those that want a gradient as leaves of a new graph."""
        if _versions(self.leaves) != self.versions:
            raise RuntimeError(_CHANGED)
        found = [t.fetch() if isinstance(t, _Promise) else t for t in self.leaves]
        return [t.detach().requires_grad_() if w else t for t, w in zip(found, self.wanted, strict=True)]

    def run(self, leaves: Sequence[Any]) -> Any:
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.forward(*args, **kwargs)

    def first(self, leaves: Sequence[Any], keep: bool) -> Any:
        def pack(t: Tensor) -> Tensor | _Saved:
            if t.untyped_storage()._cdata in self.weights:
                return t
            saved = _Saved(self)
            if keep:
                saved.keep(t)
            self.saved.append((weakref.ref(saved), t.shape, t.dtype))
            return saved

        with saved_tensors_hooks(pack, _fetch):
            return self.run(leaves)

    def returns(self, output: Any, leaves: Sequence[Any], newest: Newest) -> None:
        """Note what the block returned and was not given, so that the next may ask for it again."""
        for index, t in enumerate(tree_leaves(output)):
            if isinstance(t, Tensor) and not any(t is leaf for leaf in leaves):
                newest.results[t] = result = _Result(self, index, t._version)
                self.results.append(weakref.ref(result))

    def drop(self) -> None:
        for reference, *_ in self.saved:
            if (saved := reference()) is not None:
                saved.tensor = None

    def run_again(self) -> None:
        """Keep every promise that was made of what the block returns. Nothing that its operations save is kept."""
        with self._again(lambda t: None) as leaves:
            output = tree_leaves(self.run(leaves))
        for reference in self.results:
            result = reference()
            promise = result.waiting() if result is not None else None
            if result is not None and promise is not None:
                promise.keep(output[result.index].detach())

    def rebuild(self) -> None:
        """Make what the operations had saved, and stop with the last of it."""
        done = 0

        def pack(t: Tensor) -> Tensor | None:
            nonlocal done
            if t.untyped_storage()._cdata in self.weights:
                return t
            reference, shape, dtype = self.saved[done]
            if (shape, dtype) != (t.shape, t.dtype):
                raise RuntimeError(
                    f"checkpoint_blocks: a block saved {[*shape]} {dtype} at first and {[*t.shape]} {t.dtype} when "
                    "rebuilt; it must do the same twice"
                )
            if (saved := reference()) is not None:
                saved.keep(t)
            done += 1
            if done == len(self.saved):
                raise _Stop
            return None

        with self._again(pack) as leaves:
            _rebuilding.append(self.weights)
            try:
                self.run(leaves)
            except _Stop:
                return
            finally:
                _rebuilding.pop()
        raise RuntimeError(
            f"checkpoint_blocks: a block saved {len(self.saved)} tensors at first and {done} when rebuilt; it must do "
            "the same twice"
        )

    @contextmanager
    def _again(self, pack: Callable[[Tensor], Any]) -> Iterator[list[Any]]:
        """The arguments, and the state of the first run, with gradients: kernels may hang on it."""
        leaves = self.arguments()
        with torch.enable_grad(), as_autocast(self.autocast), saved_tensors_hooks(pack, _fetch):
            yield leaves


def _versions(leaves: Sequence[Any]) -> list[int]:
    return [t._version for t in leaves if isinstance(t, Tensor)]


def _fetch(saved: Any) -> Tensor:
    return saved.fetch() if isinstance(saved, _Saved) else saved
