"""`checkpoint_blocks`: a view of a frozen network that keeps the inputs of its blocks and rebuilds what is in them.

The backward pass reaches a block, rebuilds what its operations had saved, uses it and drops it: what is alive at once
is the inputs of all blocks (nested: of the first of every row, and of one row) and the inside of one. Compared with
`torch.utils.checkpoint` (non-reentrant, which this is as well: ordinary autograd nodes, whose saved tensors are fetched
late), frozen weights allow two savings of work:

- weights are no saved tensors, so rebuilding stops at the last operation that reads an activation: the convolution or
  linear layer which ends a block never runs again;
- the newest block keeps its inside until another one starts, so the last is not rebuilt at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ._frames import Frame, Newest
from ._joined import joining
from ._rebuilt import plain_autograd
from ._view import Forward, Make, StandIn, hooked, made, settle, view

__all__ = ["Blocks", "checkpoint_blocks"]


class Blocks(dict[str, int]):
    """For each class of block: how many are rebuilt in the backward pass."""

    def __str__(self) -> str:
        rows = [f"{'block':32} count" if self else "no block"]
        return "\n".join(rows + [f"{name:32} {count:5}" for name, count in sorted(self.items())])


def checkpoint_blocks(network: nn.Module, blocks: str | Sequence[str | type[nn.Module]] = "auto") -> nn.Module:
    """A network of the same weights whose graph keeps the inputs of its blocks; `.blocks` says which were found
    (`.checkpointed` as well, for networks with blocks of their own).

    | `blocks` | what is rebuilt in the backward pass |
    |---|---|
    | "none" | nothing |
    | "auto" | every block but the last of a call, whose inside is kept while it is the newest |
    | "all" | every block |
    | "nested" | every block, and the inputs of most: of some blocks in a row, the first alone keeps its own |
    | classes, or their names | as "auto", for blocks of these classes; a block within a block is part of it |

    A block is a member of a ModuleList, ModuleDict or Sequential with at least two layers of weights, such as a
    residual block or a transformer block; the innermost such, or the one around it where it is alone there. Where a
    U-Net's decoder joins its state with a skip connection, the joint tensor is not kept, since its parts are.
    Output and gradients are those of the network, bit for bit; each block runs at most once more, nested twice. A row
    is as long as the square root of a list of blocks, and two where the network has no lists; what is done to a block's
    result before the next takes it ends one. Under no_grad, torch.func and torch.compile the blocks run as they are.
    Blocks with hooks inside stay as they are, and are not counted. Goes with `lean` in either order.
    Raises RuntimeError for trainable weights, dropout or batch norm in train mode, and tensors changed in place;
    ValueError where no block is found.

        small = checkpoint_blocks(lean(network.requires_grad_(False).eval()))
        print(small.blocks)
    """
    chosen = [] if blocks == "none" else _blocks(network, blocks)
    ids = {id(m): type(m).__name__ for m in chosen}
    found = Blocks(Counter(ids.values()))
    newest = Newest(blocks not in ("all", "nested"), _row(network, ids) if blocks == "nested" else 1)

    def rule(module: nn.Module) -> Make | None:
        inner = made(module)
        if id(module) in ids:
            return lambda m: _checkpointed(inner(m), m, newest)
        return joining(module) if ids else None

    result = view(network, rule, "checkpoint_blocks")
    result.checkpointed = found  # type: ignore[assignment]
    if not hasattr(network, "blocks"):
        result.blocks = found  # type: ignore[assignment]
    return result


def _blocks(network: nn.Module, wanted: str | Sequence[str | type[nn.Module]]) -> list[nn.Module]:
    if isinstance(wanted, type) or (isinstance(wanted, str) and wanted not in ("auto", "all", "nested")):
        raise ValueError(f"blocks must be 'none', 'auto', 'all', 'nested' or a sequence of classes, got {wanted!r}")
    if isinstance(wanted, str):
        found = repeated_blocks(network)
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


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of "auto", "all" and "nested", in the order of the network's modules."""

    def layers(module: nn.Module) -> int:
        return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())

    def inside(module: nn.Module, member: bool) -> list[nn.Module]:
        container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        found = [b for child in module.children() for b in inside(child, container)]
        return [module] if member and not container and len(found) < 2 and layers(module) > 1 else found

    return inside(network, False)


def _row(network: nn.Module, blocks: Container[int]) -> int:
    """How many blocks in a row keep the input of the first: c inputs of n are rebuilt at a time, and n / c are kept.

    A ModuleDict is a U-Net's, whose levels differ in size: the few blocks of the largest are what counts.
    """
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    longest = max((sum(id(member) in blocks for member in m) for m in lists), default=0)
    return max(2, round(math.sqrt(longest)))


def _checkpointed(forward: Forward, module: nn.Module, newest: Newest) -> Forward:
    weights = [*module.parameters()]
    moody = [m for m in module.modules() if changes_in_training(m)]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not plain_autograd():
            return forward(*settle(args), **settle(kwargs))
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [leaf.settled() if isinstance(leaf, StandIn) else leaf for leaf in leaves]
        if not any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
            return forward(*settle(args), **settle(kwargs))
        if any(m.training for m in moody):
            raise RuntimeError(
                f"checkpoint_blocks: {type(module).__name__} is in train mode, so a rebuilt block differs; call .eval()"
            )
        frame = Frame(forward, weights, leaves, spec, newest)
        newest(frame)
        output = settle(frame.first(leaves, newest.keep))
        if newest.row > 1:
            frame.returns(output, leaves, newest)
        return output

    return call


def changes_in_training(m: nn.Module) -> bool:
    """Its output in train mode is random, or changes what it does next time."""
    rate = m.p if isinstance(m, nn.modules.dropout._DropoutNd) else m.__dict__.get("dropout")
    return isinstance(m, nn.modules.batchnorm._BatchNorm) or (isinstance(rate, float) and rate > 0)
