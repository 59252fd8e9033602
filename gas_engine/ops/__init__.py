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
from .conv_frozen import conv_frozen
from .glu import geglu, silu_mul
from .group_norm_silu import group_norm_silu
from .lincomb import lincomb
from .reference import (
    adjoint_step_reference,
    conv_frozen_reference,
    dots_reference,
    geglu_reference,
    group_norm_silu_reference,
    lincomb_reference,
    reversible_inverse_reference,
    reversible_step_reference,
    silu_mul_reference,
)
from .reversible import ResidualCodes, reversible_inverse, reversible_step

__all__ = [
    "MAX_STATES",
    "ResidualCodes",
    "adjoint_step",
    "adjoint_step_",
    "adjoint_step_reference",
    "conv_frozen",
    "conv_frozen_reference",
    "dots",
    "dots_reference",
    "geglu",
    "geglu_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "lincomb",
    "lincomb_reference",
    "reversible_inverse",
    "reversible_inverse_reference",
    "reversible_step",
    "reversible_step_reference",
    "silu_mul",
    "silu_mul_reference",
]
