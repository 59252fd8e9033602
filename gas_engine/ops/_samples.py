"""What callers bring: one `sample_inputs` per op, shared by tests and benches.

An op's own module draws its samples with `draw`; they are gathered in `tests/ops/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ODD_SIZES", "Sample", "adjoint_step_inputs", "draw", "lincomb_inputs"]

ODD_SIZES = (0, 1, 3, 129, 1134)


class Sample(NamedTuple):
    """One call: op(*args, **kwargs), and the twin likewise."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (nobody writes to it)


def draw(
    generator: torch.Generator,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A normal tensor, drawn on the host in float64: every device and dtype gets the same numbers."""
    value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    return value.contiguous(memory_format=layout).detach().requires_grad_(requires_grad)


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
    states = [draw(generator, shape, dtype, device, requires_grad, layout) for _ in range(J)]
    return states, draw(generator, (J,), torch.float64, device, requires_grad)


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
    x, f, *g = (draw(generator, shape, dtype, device, requires_grad, layout) for _ in range(J + 2))
    a, b = (draw(generator, (J,), torch.float64, device, requires_grad) for _ in range(2))
    return x, f, g, a, b


def lincomb_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """Odd sizes, many states, channels_last, mixed dtypes, the scaled second output."""
    for n in ODD_SIZES:
        yield Sample(lincomb_inputs((n,), 3, dtype, device, requires_grad))
    states, coef = lincomb_inputs((2, 3, 4, 5), 4, dtype, device, requires_grad, torch.channels_last)
    yield Sample((states, coef))
    yield Sample((states, coef, coef.detach()[:1]), {"cast": torch.bfloat16})
    narrow = draw(torch.Generator().manual_seed(1), (2, 3, 4, 5), torch.bfloat16, device, requires_grad)
    yield Sample(([states[0], narrow], coef.detach()[:2]))
    yield Sample(lincomb_inputs((5,), 64, dtype, device, requires_grad))


def adjoint_step_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """Odd sizes, many cotangents, channels_last, a network output narrower than the state."""
    for n in ODD_SIZES:
        yield Sample(adjoint_step_inputs((n,), 3, dtype, device, requires_grad))
    x, f, g, a, b = adjoint_step_inputs((2, 3, 4, 5), 2, dtype, device, requires_grad, torch.channels_last)
    yield Sample((x, f, g, a, b))
    yield Sample((x, f.detach().bfloat16().requires_grad_(requires_grad), g, a, b))
    yield Sample(adjoint_step_inputs((5,), 64, dtype, device, requires_grad))


def group_norm_silu_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
) -> Iterator[Sample]:
    """Odd sizes, every layout and activation, each optional vector on its own, groups of one number, nothing."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, layout: torch.memory_format = torch.contiguous_format, constant: bool = False) -> Tensor:
        return draw(generator, shape, dtype, device, requires_grad and not constant, layout)

    for C, N, groups in ((1, 1, 1), (3, 3, 1), (6, 129, 3), (2, 1134, 2), (129, 3, 43), (1134, 1, 9), (6, 0, 2)):
        scale, shift = new(2, C), new(2, C)
        affine = {"weight": new(C, constant=True), "bias": new(C, constant=True)}
        yield Sample((new(2, C, N), groups), {**affine, "scale": scale, "shift": shift})
    yield Sample((new(3, 8), 2), {"weight": new(8, constant=True), "act": "gelu"})
    yield Sample((new(3, 8), 8), {"shift": new(3, 8)})
    yield Sample((new(0, 8, 4, 4), 2), {"scale": new(0, 8)})
    for act in ("none", "silu", "gelu", "gelu_tanh"):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = new(2, 12, 5, 7, layout=layout)
            yield Sample((x, 4), {"act": act, "scale": new(2, 12, 1, 1), "eps": 1e-3})
            yield Sample((x, 3), {"act": act, "shift": new(2, 12, 1, 1), "bias": new(12, constant=True)})
    x = new(2, 24, 3, 4, 5, layout=torch.channels_last_3d)
    yield Sample((x, 8), {"scale": new(2, 24), "shift": new(2, 24, 1, 1, 1)})
