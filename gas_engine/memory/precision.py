"""`cast`: a view of a frozen network that computes in another precision, or in channels-last layout.

| stays as it is | is cast |
|---|---|
| states, told times and the scalings around the network | its weights, once: half the bytes in bf16 and fp16 |
| labels, scalars or [B], in float64 or float32 | what it is shown of a state, and conditions |
| modules named in a network's `_keep_in_fp32_modules` | its output, back to the state's dtype |

Autocast would keep the float32 weights, and a graph the copies that it makes of them for every layer of every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ._view import Forward, Make, made, view

__all__ = ["cast", "core"]


def core(network: nn.Module) -> nn.Module:
    """The innermost module with children that holds all the weights: what is around it only scales and labels."""
    inside = [m for m in network.children() if any(True for _ in m.parameters())]
    own = any(True for _ in network.parameters(recurse=False))
    if own or len(inside) != 1 or not any(True for _ in inside[0].children()):
        return network
    # A list of layers is nobody's network: it is not called itself.
    return network if isinstance(inside[0], nn.ModuleList | nn.ModuleDict) else core(inside[0])


def cast(
    network: nn.Module,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    channels_last: bool = False,
) -> nn.Module:
    """A view of the network with weights of its own, in ``dtype`` and on ``device``, each as it was unless given.

    Floating tensors of two dimensions or more go into its core in that dtype, what comes out returns in the dtype of
    the first of them. A scalar or a vector is a label, such as a time, and keeps its digits: the module that embeds it
    does so in float32 or float64, where it says so by ``_keep_in_fp32_modules``, a list of names as diffusers has it.
    With ``channels_last``, images and the weights of 2-D convolutions are laid out so, and images come out contiguous.
    Memory: the weights once more, in the new dtype; the original may then be dropped.
    Raises RuntimeError for trainable weights.

        half = cast(denoiser.requires_grad_(False), torch.bfloat16, "cuda")
    """
    middle = core(network)

    def rule(module: nn.Module) -> Make | None:
        inner = made(module)
        return (lambda m: _in_precision(inner(m), dtype, channels_last)) if module is middle else None

    result = view(network, rule, "cast")
    kept = {name for m in network.modules() for name in getattr(m, "_keep_in_fp32_modules", None) or ()}
    copies: dict[int, Tensor] = {}  # a weight used twice stays one weight

    def converted(t: Tensor, name: str) -> Tensor:
        if id(t) not in copies:
            narrow = t.is_floating_point() and not kept & {*name.split(".")}
            layout = torch.channels_last if channels_last and t.ndim == 4 else torch.preserve_format
            other = t.detach().to(device=device, dtype=dtype if narrow else None, memory_format=layout)
            copies[id(t)] = nn.Parameter(other, requires_grad=False) if isinstance(t, nn.Parameter) else other
        return copies[id(t)]

    for prefix, module in result.named_modules():
        tensors: dict[str, Any]
        for tensors in (module._parameters, module._buffers):
            tensors |= {key: converted(t, f"{prefix}.{key}") for key, t in tensors.items() if t is not None}
    return result


def _in_precision(forward: Forward, dtype: torch.dtype | None, channels_last: bool) -> Forward:
    def moved(value: Any, dtype: torch.dtype | None, image: torch.memory_format) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
            return value
        layout = image if channels_last and value.ndim == 4 else torch.preserve_format
        return value.to(dtype=dtype, memory_format=layout)

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = (v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor))
        state = next((v.dtype for v in leaves if v.is_floating_point() and v.ndim > 1), None)
        args, kwargs = tree_map(lambda v: moved(v, dtype, torch.channels_last), (args, kwargs))
        output = forward(*args, **kwargs)
        return tree_map(lambda v: moved(v, state, torch.contiguous_format), output)

    return call


def power_of_two(mu: Tensor) -> Tensor:
    """That of mu's largest number, which divides it exactly and leaves it between 1 and 2; at least 2^-100.

    A cotangent so divided has float16's range to itself, and its products, multiplied back, are exact.
    """
    largest = torch.linalg.vector_norm(mu, torch.inf).float()
    exponent = largest.view(torch.int32) & 0x7F800000
    return exponent.view(torch.float32).clamp(min=2.0**-100)
