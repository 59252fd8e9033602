"""Views of a frozen network: the same weights and buffers under modules whose forward may be another.

`lean` and `checkpoint_blocks` are both such views, and a view of a view works as one expects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

Forward = Callable[..., Any]
Make = Callable[[Any], Forward | None]  # from a module, the forward it shall have; None leaves it its own


def view(network: nn.Module, rule: Callable[[nn.Module], Make | None], caller: str) -> nn.Module:
    """The network once more, with shared tensors; `rule` says for each of its modules how to make the new forward.

    Raises RuntimeError for trainable weights, in the name of `caller`.
    """
    trainable = next((name for name, p in network.named_parameters() if p.requires_grad), None)
    if trainable is not None:
        raise RuntimeError(
            f"{caller}: the weight {trainable!r} is trainable, and its gradient would need what {caller} drops; "
            "freeze the network with requires_grad_(False)"
        )
    twins: dict[int, nn.Module] = {}  # a module used twice stays one module

    def convert(module: nn.Module) -> nn.Module:
        if id(module) in twins:
            return twins[id(module)]
        twins[id(module)] = twin = _shallow(module)
        for key, child in module._modules.items():
            twin._modules[key] = None if child is None else convert(child)
        if (make := rule(module)) is not None:
            install(twin, make)
        return twin

    result = convert(network)
    inner = made(result)
    install(result, lambda m: _settling(inner(m)))
    return result


def _settling(forward: Forward) -> Forward:
    return lambda *args, **kwargs: settle(forward(*args, **kwargs))


def _shallow(module: nn.Module) -> nn.Module:
    """The same object once more: own dictionaries, shared tensors."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    installed = module.__dict__.get("forward")
    if isinstance(installed, _Installed):
        install(twin, installed.make)
    return twin


class _Installed:
    """A forward that remembers how it is made, so that a view or a deep copy of the module makes its own."""

    def __init__(self, module: nn.Module, make: Make) -> None:
        self.module, self.make = module, make
        self.call: Forward | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.call is None:
            self.call = self.make(self.module) or type(self.module).forward.__get__(self.module)
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Installed:
        return _Installed(memo.get(id(self.module), self.module), self.make)


def install(twin: nn.Module, make: Make) -> None:
    twin.__dict__["forward"] = _Installed(twin, make)


def made(module: nn.Module) -> Callable[[Any], Forward]:
    """How the module's present forward is made, for another module of its kind."""
    present = module.__dict__.get("forward")
    if isinstance(present, _Installed):
        make = present.make
        return lambda m: make(m) or type(m).forward.__get__(m)
    if present is not None:  # set by somebody else
        return lambda m: present
    return lambda m: type(m).forward.__get__(m)


def hooked(module: nn.Module) -> bool:
    """Somebody listens to this module, or has given it a forward of its own."""
    present = module.__dict__.get("forward")
    listeners = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(listeners) or (present is not None and not isinstance(present, _Installed))


class StandIn:
    """Stands where PyTorch takes a tensor, and becomes one when more than its place is wanted; `isinstance` tells."""

    _tensor: Tensor | None = None

    def make(self) -> Tensor:
        raise NotImplementedError

    def settled(self) -> Tensor:
        """The tensor itself, made once."""
        if self._tensor is None:
            self._tensor = self.make()
        return self._tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settled(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*settle(args), **settle(kwargs or {}))


def _forward_to_tensor(name: str) -> Forward:
    def operator(self: StandIn, *args: Any) -> Any:
        return getattr(self.settled(), name)(*settle(args))

    return operator


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "matmul", "rmatmul", "getitem",
    "len",
):  # fmt: skip
    setattr(StandIn, f"__{_name}__", _forward_to_tensor(f"__{_name}__"))


def settle(value: Any) -> Any:
    """The value with tensors in the place of stand-ins."""
    if isinstance(value, Tensor):
        return value
    return tree_map(lambda v: v.settled() if isinstance(v, StandIn) else v, value, is_leaf=_stands_in)


def _stands_in(value: Any) -> bool:
    return isinstance(value, StandIn)
