"""`checkpoint_blocks`: a view of a frozen network that keeps the inputs of its blocks and rebuilds what is in them.

The backward pass reaches a block, rebuilds what its operations had saved, uses it and drops it: what is alive at once
is the inputs of all blocks and the inside of one. Compared with `torch.utils.checkpoint` (non-reentrant, which this
is as well: ordinary autograd nodes, whose saved tensors are fetched late), frozen weights allow two savings of work:

- weights are no saved tensors, so rebuilding stops at the last operation that reads an activation: the convolution or
  linear layer which ends a block never runs again;
- the newest block keeps its inside until another one starts, so the last is not rebuilt at all.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_unflatten

from ._functions import autocast_state, join
from ._view import Forward, Make, StandIn, hooked, made, settle, view

__all__ = ["Blocks", "checkpoint_blocks"]


class Blocks(dict[str, int]):
    """For each class of block: how many are rebuilt in the backward pass."""

    def __str__(self) -> str:
        rows = [f"{'block':32} count" if self else "no block"]
        return "\n".join(rows + [f"{name:32} {count:5}" for name, count in sorted(self.items())])


def checkpoint_blocks(network: nn.Module, blocks: str | Sequence[str | type[nn.Module]] = "auto") -> nn.Module:
    """A network of the same weights whose graph keeps the inputs of its blocks; `.blocks` says which were found.

    | `blocks` | what is rebuilt in the backward pass |
    |---|---|
    | "none" | nothing |
    | "auto" | every block but the last of a call, whose inside is kept while it is the newest |
    | "all" | every block |
    | classes, or their names | as "auto", for blocks of these classes; a block within a block is part of it |

    A block is a member of a ModuleList, ModuleDict or Sequential with at least two layers of weights, such as a
    residual block or a transformer block; the innermost such, or the one around it where it is alone there. Where a
    U-Net's decoder joins its state with a skip connection, the joint tensor is not kept, since its parts are.
    Output and gradients are those of the network, bit for bit; each block runs at most once more. Under no_grad the
    blocks run as they are. Blocks with hooks inside stay as they are. Goes with `lean` in either order.
    Raises RuntimeError for trainable weights, ValueError where no block is found.

        small = checkpoint_blocks(lean(network.requires_grad_(False).eval()))
        print(small.blocks)
    """
    chosen = [] if blocks == "none" else _blocks(network, blocks)
    found = Blocks(Counter(type(m).__name__ for m in chosen))
    ids = {id(m) for m in chosen}
    newest = _Newest(keep=blocks != "all")

    def rule(module: nn.Module) -> Make | None:
        inner = made(module)
        if id(module) in ids:
            return lambda m: _checkpointed(inner(m), m, newest)
        if ids and "res_hidden_states_tuple" in _parameters(module):
            return lambda m: _joining(inner(m), _parameters(m).index("res_hidden_states_tuple"))
        return None

    result = view(network, rule, "checkpoint_blocks")
    result.blocks = found  # type: ignore[assignment]
    return result


def _blocks(network: nn.Module, wanted: str | Sequence[str | type[nn.Module]]) -> list[nn.Module]:
    if isinstance(wanted, str) and wanted not in ("auto", "all"):
        raise ValueError(f"blocks must be 'none', 'auto', 'all' or a sequence of classes, got {wanted!r}")
    if isinstance(wanted, str):
        found = _repeated(network)
        hint = "name the classes of its blocks: checkpoint_blocks(network, ['MyBlock'])"
    else:
        names = [w if isinstance(w, str) else w.__name__ for w in wanted]
        found = _outermost(network, lambda m: type(m).__name__ in names)
        missing = sorted({*names} - {type(m).__name__ for m in network.modules()})
        hint = f"it has {', '.join(sorted({type(m).__name__ for m in network.modules()}))}"
        if missing:
            raise ValueError(f"{type(network).__name__} has no block {', '.join(missing)}; {hint}")
    free = [m for m in found if not any(map(hooked, m.modules()))]
    if not free:
        seen = "all its blocks have hooks" if found else "no block was found"
        raise ValueError(f"checkpoint_blocks: {seen} in {type(network).__name__}; {hint}")
    return free


def _outermost(module: nn.Module, is_block: Callable[[nn.Module], bool]) -> list[nn.Module]:
    if is_block(module):
        return [module]
    return [b for child in module.children() for b in _outermost(child, is_block)]


def _repeated(network: nn.Module) -> list[nn.Module]:
    def layers(module: nn.Module) -> int:
        return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())

    def inside(module: nn.Module, member: bool) -> list[nn.Module]:
        container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        found = [b for child in module.children() for b in inside(child, container)]
        return [module] if member and not container and len(found) < 2 and layers(module) > 1 else found

    return inside(network, False)


class _Saved:
    """What one operation of a block had saved, or the promise of it."""

    __slots__ = ("__weakref__", "frame", "tensor")

    def __init__(self, frame: _Frame, tensor: Tensor | None) -> None:
        self.frame, self.tensor = frame, tensor

    def fetch(self) -> Tensor:
        if self.tensor is None:
            self.frame.rebuild()
        assert self.tensor is not None
        return self.tensor


class _Newest:
    """The block that ran last."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.frame: Callable[[], _Frame | None] = lambda: None

    def __call__(self, frame: _Frame) -> None:
        previous = self.frame()
        if previous is not None:
            previous.drop()
        self.frame = weakref.ref(frame)


class _Stop(Exception):
    pass


class _Frame:
    """One call of one block: its arguments, which stay, and what its operations save, which is kept or rebuilt."""

    def __init__(self, forward: Forward, weights: Sequence[Tensor], args: Any, kwargs: Any) -> None:
        self.forward = forward
        leaves, self.spec = tree_flatten((args, kwargs))
        self.leaves = [leaf.settled() if isinstance(leaf, StandIn) else leaf for leaf in leaves]
        self.tensors = [t for t in self.leaves if isinstance(t, Tensor)]
        self.versions = [t._version for t in self.tensors]
        self.weights = {w.untyped_storage()._cdata for w in weights}
        self.saved: list[weakref.ref[_Saved]] = []
        device = self.tensors[0].device.type if self.tensors else "cpu"
        self.autocast = autocast_state(device)

    @property
    def differentiable(self) -> bool:
        return any(t.requires_grad for t in self.tensors)

    def run(self, leaves: Sequence[Any]) -> Any:
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.forward(*args, **kwargs)

    def first(self, keep: bool) -> Any:
        def pack(t: Tensor) -> Tensor | _Saved:
            if t.untyped_storage()._cdata in self.weights:
                return t
            saved = _Saved(self, t if keep else None)
            self.saved.append(weakref.ref(saved))
            return saved

        with saved_tensors_hooks(pack, _fetch):
            return self.run(self.leaves)

    def drop(self) -> None:
        for reference in self.saved:
            if (saved := reference()) is not None:
                saved.tensor = None

    def rebuild(self) -> None:
        if [t._version for t in self.tensors] != self.versions:
            raise RuntimeError("checkpoint_blocks: an input of a block was changed in place after the block had run")
        done = 0

        def pack(t: Tensor) -> Tensor | None:
            nonlocal done
            if t.untyped_storage()._cdata in self.weights:
                return t
            if (saved := self.saved[done]()) is not None:
                saved.tensor = t
            done += 1
            if done == len(self.saved):
                raise _Stop
            return None

        leaves = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in self.leaves]
        try:
            with torch.enable_grad(), torch.autocast(*self.autocast), saved_tensors_hooks(pack, _fetch):
                self.run(leaves)
        except _Stop:
            return
        raise RuntimeError(
            f"checkpoint_blocks: a block saved {len(self.saved)} tensors at first and {done} when rebuilt; it must do "
            "the same twice: call .eval()"
        )


def _fetch(saved: Any) -> Tensor:
    return saved.fetch() if isinstance(saved, _Saved) else saved


def _checkpointed(forward: Forward, module: nn.Module, newest: _Newest) -> Forward:
    weights = [*module.parameters()]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*settle(args), **settle(kwargs))
        frame = _Frame(forward, weights, args, kwargs)
        if not frame.differentiable:
            return frame.run(frame.leaves)
        if newest.keep:
            newest(frame)
        return settle(frame.first(newest.keep))

    return call


class _Skip(StandIn):
    """A skip connection of a U-Net, on its way to a concatenation."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and all(isinstance(t, Tensor | _Skip) for t in args[0]):
            return _Joined([t.settled() if isinstance(t, _Skip) else t for t in args[0]], *args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class _Joined(StandIn):
    """A concatenation that has not run yet; as an argument of a block it runs inside, and its parts are kept."""

    def __init__(self, parts: Sequence[Tensor], dim: int = 0) -> None:
        self.parts, self.dim = parts, dim

    def make(self) -> Tensor:
        return join(self.parts, self.dim)


register_pytree_node(_Joined, lambda j: (list(j.parts), j.dim), lambda parts, dim: join([*parts], dim))


def _parameters(module: nn.Module) -> list[str]:
    return [*inspect.signature(type(module).forward).parameters][1:]


def _joining(forward: Forward, position: int) -> Forward:
    """An up block of diffusers: its skip connections are joined inside of its residual blocks."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            if "res_hidden_states_tuple" in kwargs:
                kwargs = {**kwargs, "res_hidden_states_tuple": _skips(kwargs["res_hidden_states_tuple"])}
            else:
                args = (*args[:position], _skips(args[position]), *args[position + 1 :])
        return forward(*args, **kwargs)

    return call


def _skips(states: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_Skip(t) if isinstance(t, Tensor) else t for t in states)
