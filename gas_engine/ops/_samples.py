"""One `sample_inputs` per op, shared by tests and benches: the shapes, dtypes and layouts callers bring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ODD_SIZES", "adjoint_step_inputs", "lincomb_inputs"]

ODD_SIZES = (0, 1, 3, 129, 1134)


def _states(
    count: int,
    shape: tuple[int, ...],
    generator: torch.Generator,
    layout: torch.memory_format,
    **options: Any,
) -> list[Tensor]:
    """Random states; drawn on the host in float64, so that every device and dtype gets the same numbers."""
    grad = options.pop("requires_grad", False)
    states = [torch.randn(shape, generator=generator, dtype=torch.float64).to(**options) for _ in range(count)]
    if layout != torch.contiguous_format:
        states = [s.contiguous(memory_format=layout) for s in states]
    return [s.detach().requires_grad_(grad) for s in states]


def lincomb_inputs(
    shape: tuple[int, ...] = (24, 3, 32, 32),
    J: int = 10,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Inputs (states, coef) of `lincomb`: J states of `shape` in `dtype`, coef [J] float64."""
    generator = torch.Generator().manual_seed(seed)
    states = _states(J, shape, generator, layout, dtype=dtype, device=device, requires_grad=requires_grad)
    (coef,) = _states(1, (J,), generator, torch.contiguous_format, device=device, requires_grad=requires_grad)
    return states, coef


def adjoint_step_inputs(
    shape: tuple[int, ...] = (24, 3, 32, 32),
    J: int = 10,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Inputs (x, f, g, a, b) of `adjoint_step`: states of `shape` in `dtype`, a and b [J] float64."""
    generator = torch.Generator().manual_seed(seed)
    x, f, *g = _states(J + 2, shape, generator, layout, dtype=dtype, device=device, requires_grad=requires_grad)
    a, b = _states(2, (J,), generator, torch.contiguous_format, device=device, requires_grad=requires_grad)
    return x, f, g, a, b
