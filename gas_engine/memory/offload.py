"""`Offloaded`: states, outputs and cotangents in page-locked host memory; the device holds the newest of each.

A row of the tableau reads its older states in slices: a slice of each is brought over, combined, and forgotten. What
is computed of states is elementwise, so the slices give the very bits of the whole; inner products are summed slice by
slice, which moves their last digits. Copies to the host run on a stream of their
own beside the next evaluation. The buffers belong to the engine and serve the next rollout again.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import adjoint_step, lincomb
from .tracker import phase
from .trajectory import Coefficients, last_use

SLICE = 1 << 16  # elements at least; more as long as all the slices together fit in one state


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Pool:
    """Page-locked buffers by size and dtype: locking pages costs more than filling them."""

    def __init__(self) -> None:
        self.free: dict[tuple, list[Tensor]] = {}

    def take(self, like: Tensor) -> Tensor:
        key = (like.numel(), like.dtype, like.device, type(like))  # fake tensors keep to themselves
        if self.free.get(key):
            return self.free[key].pop()
        with phase("host"):
            return torch.empty(like.numel(), dtype=like.dtype, pin_memory=like.device.type == "cuda")

    def give(self, buffers: dict[Any, Tensor], device: torch.device) -> None:
        for buffer in buffers.values():
            self.free.setdefault((buffer.numel(), buffer.dtype, device, type(buffer)), []).append(buffer)
        buffers.clear()


_POOL = _Pool()


def release() -> None:
    """Give the free host buffers back to the system, for states of another size."""
    _POOL.free.clear()


class Offloaded:
    """The states and outputs on the host; see ``Kept`` for the calls."""

    def __init__(self, numbers: Coefficients, x: Tensor) -> None:
        self.numbers, self.dtype, self.shape, self.device = numbers, x.dtype, x.shape, x.device
        self.host: dict[tuple[str, int], Tensor] = {}
        self.newest: dict[tuple[str, int], Tensor] = {}
        self._finalizer = weakref.finalize(self, _POOL.give, self.host, x.device)
        self._last_output = last_use(numbers.output_terms)
        self._send("x", 0, x.detach().contiguous())

    def input(self, j: int) -> Tensor:
        """The network's input at x[j]."""
        return self.numbers.input(j, self._fetch("x", j), self.dtype)

    def step(self, n: int, output: Tensor) -> Tensor:
        """Take F[n], return x[n+1]."""
        self.newest["F", n] = output.to(self.dtype).contiguous()
        numbers = self.numbers
        names = [*(("x", j) for j in numbers.state_terms[n]), *(("F", j) for j in numbers.output_terms[n])]
        new = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        flat = new.view(-1)
        for part, pieces in self._slices(names):
            flat[part] = lincomb(pieces, numbers.rows[n])
        done = self._last_output[n]
        if n not in done:
            self._send("F", n, self.newest["F", n])
        for j in done:
            self._free("F", j)
        self.newest.clear()
        self._send("x", n + 1, new)
        return new

    def take(self, n: int) -> Tensor:
        """Hand out x[K]."""
        result = self.newest.pop(("x", n))
        self._free("x", n)
        return result

    def turn(self, grad: Tensor, result: Tensor | None) -> None:
        """Begin the way back with g[K]."""
        self._send("g", self.numbers.steps, grad.contiguous())

    def mu(self, j: int, dtype: torch.dtype) -> Tensor:
        """mu[j] alone."""
        mu = torch.empty(self.shape, dtype=dtype, device=self.device)
        for part, pieces in self._slices(self._later(j)):
            mu.view(-1)[part] = lincomb(pieces, self.numbers.columns[j][1])
        return mu

    def adjoint(self, j: int, output: Tensor) -> tuple[Tensor, Tensor]:
        """mu[j] and the products."""
        self.newest["F", j] = output.contiguous()
        self.partial = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        mu = torch.empty_like(self.newest["F", j])
        sums = torch.zeros(2, self.numbers.steps - j, dtype=torch.float64, device=self.device)
        for part, (f, x, *g) in self._slices([("F", j), ("x", j), *self._later(j)]):
            mu.view(-1)[part], self.partial.view(-1)[part], *products = adjoint_step(x, f, g, *self.numbers.columns[j])
            sums += torch.stack(products)
        del self.newest["F", j]
        return mu, sums

    def settle(self, j: int, vjp: Tensor | None) -> Tensor | None:
        """Put g[j] in the place of x[j]; returns the derivative by c_in[j], where there is such a scale."""
        product = self.numbers.join(j, self.partial, vjp, lambda: self._fetch("x", j))
        self._free("x", j)
        self.newest.clear()
        self._send("g", j, self.partial)
        del self.partial
        return product

    def cotangent(self) -> Tensor:
        """g[0]; the buffers go back to the pool."""
        result = self.newest["g", 0]
        self._finalizer()
        return result

    def _send(self, kind: str, n: int, value: Tensor) -> None:
        """Keep a copy on the host, made beside what the device does next; the value itself is the newest."""
        self.newest[kind, n] = value
        self.host[kind, n] = buffer = _POOL.take(value)
        if value.device.type != "cuda":
            buffer.copy_(value.reshape(-1))
            return
        stream = _stream(value.device)
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            buffer.copy_(value.reshape(-1), non_blocking=True)
        value.record_stream(stream)

    def _fetch(self, kind: str, n: int) -> Tensor:
        if (kind, n) not in self.newest:
            self._wait()
            value = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            value.view(-1).copy_(self.host[kind, n], non_blocking=True)
            self.newest[kind, n] = value
        return self.newest[kind, n]

    def _free(self, kind: str, n: int) -> None:
        self.newest.pop((kind, n), None)
        if (kind, n) in self.host:
            _POOL.give({0: self.host.pop((kind, n))}, self.device)

    def _wait(self) -> None:
        """Later reads of host buffers come after the copies into them."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(_stream(self.device))

    def _later(self, j: int) -> list[tuple[str, int]]:
        return [("g", n) for n in range(j + 1, self.numbers.steps + 1)]

    def _slices(self, names: Sequence[tuple[str, int]]) -> Iterator[tuple[slice, list[Tensor]]]:
        """The same slice of each tensor, brought to the device where it is not there, one slice after the other."""
        self._wait()
        count = self.shape.numel()
        size = max(SLICE, -(-count // len(names)))
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            yield (
                part,
                [
                    self.newest[name].view(-1)[part]
                    if name in self.newest
                    else self.host[name][part].to(self.device, non_blocking=True)
                    for name in names
                ],
            )
