"""Fused ops of the solver, importable by other projects; each has a twin in plain PyTorch in `reference`.

| op | computes | moves (states of N elements) |
|---|---|---|
| `lincomb` | sum_i coef[i] states[i], optionally scaled and cast for the network | J + 1 (J + 2) |
| `adjoint_step` | sum_i b[i] g[i], sum_i a[i] g[i], <g[i], x>, <g[i], f> | J + 4 |
| `dots` | <states[i], x> | J + 1 |
| `bias_leaky_relu` | leaky ReLU of x + bias[c]; keeps one bit per element | 2 |
| `resample2d` | separable FIR filter of images, up or down by two; keeps nothing | x + y |

Registered with `torch.library` as `gas_engine::*`: they work under autograd, torch.compile and fake tensors.
"""

from ._native import MAX_STATES
from .adjoint import adjoint_step, adjoint_step_, dots
from .bias_leaky_relu import bias_leaky_relu
from .lincomb import lincomb
from .reference import (
    adjoint_step_reference,
    bias_leaky_relu_reference,
    dots_reference,
    lincomb_reference,
    resample2d_reference,
)
from .resample2d import resample2d

__all__ = [
    "MAX_STATES",
    "adjoint_step",
    "adjoint_step_",
    "adjoint_step_reference",
    "bias_leaky_relu",
    "bias_leaky_relu_reference",
    "dots",
    "dots_reference",
    "lincomb",
    "lincomb_reference",
    "resample2d",
    "resample2d_reference",
]
