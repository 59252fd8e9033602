"""Fused ops, importable by other projects; each has a twin in plain PyTorch in `reference`.

| op | computes | keeps for the gradient | moves |
|---|---|---|---|
| `lincomb` | sum_i coef[i] states[i], optionally scaled and cast for the network | - | J + 1 (J + 2) states |
| `adjoint_step` | sum_i b[i] g[i], sum_i a[i] g[i], <g[i], x>, <g[i], f> | - | J + 4 states |
| `dots` | <states[i], x> | - | J + 1 states |
| `reversible_step` | a two-state solver step and what undoes it to the bit | one byte an element | 4 states |
| `group_norm_silu` | act(GroupNorm(x) (1 + scale) + shift), weight and bias frozen | x | 2, back 3 |
| `conv_frozen` | PyTorch's convolutions with frozen weights | nothing | PyTorch's |
| `geglu`, `silu_mul` | value * gelu(gate), silu(gate) * value | the inputs, once | 3, back 5 |
| `bias_leaky_relu` | leaky ReLU of x + bias[c] | one bit an element | 2, back 2 |
| `resample2d` | separable FIR filter of images, up or down by two | nothing | x + y |

Registered with `torch.library` as `gas_engine::*`: they work under autograd, torch.compile, torch.func, fake tensors.
"""

from ._checks import MAX_STATES
from .adjoint import adjoint_step, adjoint_step_, dots
from .bias_leaky_relu import bias_leaky_relu
from .conv_frozen import conv_frozen
from .glu import geglu, silu_mul
from .group_norm_silu import group_norm_silu
from .lincomb import lincomb
from .reference import (
    adjoint_step_reference,
    bias_leaky_relu_reference,
    conv_frozen_reference,
    dots_reference,
    geglu_reference,
    group_norm_silu_reference,
    lincomb_reference,
    resample2d_reference,
    reversible_inverse_reference,
    reversible_step_reference,
    silu_mul_reference,
)
from .resample2d import resample2d
from .reversible import ResidualCodes, reversible_inverse, reversible_step

__all__ = [
    "MAX_STATES",
    "ResidualCodes",
    "adjoint_step",
    "adjoint_step_",
    "adjoint_step_reference",
    "bias_leaky_relu",
    "bias_leaky_relu_reference",
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
    "resample2d",
    "resample2d_reference",
    "reversible_inverse",
    "reversible_inverse_reference",
    "reversible_step",
    "reversible_step_reference",
    "silu_mul",
    "silu_mul_reference",
]
