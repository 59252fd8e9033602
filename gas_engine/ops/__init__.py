"""Fused ops of the solver, importable by other projects; each has a twin in plain PyTorch in `reference`.

| op | computes | moves (states of N elements) |
|---|---|---|
| `lincomb` | sum_i coef[i] states[i], optionally scaled and cast for the network | J + 1 (J + 2) |
| `adjoint_step` | sum_i b[i] g[i], sum_i a[i] g[i], <g[i], x>, <g[i], f> | J + 4 |
| `dots` | <states[i], x> | J + 1 |
| `group_norm_silu` | act(GroupNorm(x) (1 + scale) + shift), weight and bias frozen | 2 from cache (forward) |

Registered with `torch.library` as `gas_engine::*`: they work under autograd, torch.compile and fake tensors.
"""

from ._native import MAX_STATES
from .adjoint import adjoint_step, adjoint_step_, dots
from .group_norm_silu import group_norm_silu
from .lincomb import lincomb
from .reference import adjoint_step_reference, dots_reference, group_norm_silu_reference, lincomb_reference

__all__ = [
    "MAX_STATES",
    "adjoint_step",
    "adjoint_step_",
    "adjoint_step_reference",
    "dots",
    "dots_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "lincomb",
    "lincomb_reference",
]
