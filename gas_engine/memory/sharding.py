"""Frozen weights spread over processes: each holds a part of every block, and a block is whole while it runs."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from torch import nn

from ._view import view
from .blocks import repeated_blocks

__all__ = ["shard_weights"]


def shard_weights(network: nn.Module, device: torch.device | str) -> nn.Module:
    """A view of a network whose weights are spread over all processes of torch.distributed, computing on ``device``.

    FSDP2 (``fully_shard``, arXiv 2304.11277), block by block and then the rest: the weights of a block are gathered
    when it runs, forward and backward, and freed after it; frozen weights have no gradient, so nothing is reduced. Same
    outputs and gradients to rounding. All processes must call it equally often, each with rows of its own.

    It comes last: ``lean`` and ``checkpoint_blocks`` are views that share the weights they find, and here those are
    parts. The network itself stays as it is, in host memory, until it is dropped.

    Memory on the device: weights / processes, two blocks, what is in no block while the network runs, and what several
    blocks share.
    Raises RuntimeError for trainable weights or without torch.distributed, ValueError where no block is found.

        small = shard_weights(checkpoint_blocks(lean(network.requires_grad_(False))), "cuda:0")
    """
    # Slow to import, and nothing else needs them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = torch.device(device)
    if not torch.distributed.is_initialized():
        raise RuntimeError("shard_weights: there are no other processes; start with torchrun --nproc-per-node N")
    if not repeated_blocks(network):
        raise ValueError(f"shard_weights: no block was found in {type(network).__name__}, so it cannot come in parts")
    result = view(network, lambda module: None, "shard_weights")
    own: dict[int, nn.Parameter] = {}  # fully_shard moves parameters in place
    for module in result.modules():
        for key, value in module._parameters.items():
            if value is not None:
                module._parameters[key] = own.setdefault(id(value), nn.Parameter(value.detach(), requires_grad=False))
    blocks = repeated_blocks(result)
    uses = Counter(p for block in blocks for p in block.parameters())
    shared = {p for p, count in uses.items() if count > 1}
    for p in shared:
        p.data = p.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (*blocks, result):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=shared)
    # Nobody changes an output in place here.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    return result
