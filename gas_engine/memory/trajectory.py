"""Where the states of a rollout live: the part of the sampling loop and of its adjoint that touches them.

    forward   x[n+1] = sum_{j<=n} A[n,j] x[j] + B[n,j] F[j]
    backward  mu[j] = sum_{n>=j} B[n,j] g[n+1],    g[j] = sum_{n>=j} A[n,j] g[n+1] + c_in[j] VJP(j, mu[j])

`Kept` holds every state on the device; `Offloaded` and `Reversible` are its two alternatives. Each is used as

    input(n) -> step(n, F[n])  for n = 0 .. K-1,   take(K),   then   turn(g[K], x[K]),
    input(j) -> adjoint(j, F[j]) -> settle(j, VJP)  for j = K-1 .. 0,   and cotangent().
Shape legend: K steps, states [...] of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops import adjoint_step, lincomb


class Coefficients:
    """A tableau's numbers as the two passes read them, on the states' device; A, B [K, K] and c_in [K] or None."""

    def __init__(self, A: Tensor, B: Tensor, c_in: Tensor | None, device: torch.device, adjoint: bool) -> None:
        self.steps = len(A)
        # An exact zero needs neither a read nor a slot. All the others cross to the device at once, and
        # nobody waits for what the device was asked before.
        both = torch.cat([A, B], dim=1)
        used = [[j for j, value in enumerate(row) if value != 0.0] for row in both.tolist()]
        self.rows = both[both != 0].to(device, non_blocking=True).split([len(columns) for columns in used])
        self.state_terms = [[j for j in columns if j < self.steps] for columns in used]
        self.output_terms = [[j - self.steps for j in columns if j >= self.steps] for columns in used]
        self.c_in = None if c_in is None else c_in.to(device, non_blocking=True)
        self.columns: list[Sequence[Tensor]] = []
        if adjoint:  # columns of A and B from the diagonal down
            lower = torch.ones_like(A, dtype=torch.bool).triu()
            pairs = torch.stack([A.T[lower], B.T[lower]]).to(device, non_blocking=True)
            self.columns = [pair.unbind() for pair in pairs.split(list(range(self.steps, 0, -1)), dim=1)]

    def input(self, j: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the network sees of x[j]: c_in[j] x[j], rounded once."""
        if self.c_in is None:
            return x.to(dtype)
        # The op that scales new states, so that a rebuilt input has the very same bits.
        one = torch.ones(1, dtype=torch.float64, device=x.device)
        return lincomb([x], one, scale=self.c_in[j : j + 1], cast=dtype)[1]

    def next(self, n: int, terms: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x[n+1] from the states and outputs of row n, and what the network will see of it."""
        if self.c_in is None or n + 1 == self.steps:
            new = lincomb(terms, self.rows[n])
            return new, new.to(dtype)
        return lincomb(terms, self.rows[n], scale=self.c_in[n + 1 : n + 2], cast=dtype)

    def join(self, j: int, partial: Tensor, vjp: Tensor | None, x: Callable[[], Tensor]) -> Tensor | None:
        """partial += c_in[j] vjp; returns <vjp, x[j]>, the derivative by c_in[j], where there is such a scale."""
        if vjp is None:
            return None
        if self.c_in is None:
            partial += vjp
            return None
        partial.addcmul_(vjp, self.c_in[j].to(vjp.dtype))
        return torch.dot(vjp.flatten().double(), x().flatten().double())


def last_use(terms: list[list[int]]) -> list[list[int]]:
    """For each step, the columns that no later step reads; one that is never read goes at its own step."""
    last = {j: j for j in range(len(terms))}
    for n, columns in enumerate(terms):
        last.update((j, n) for j in columns)
    return [[j for j, step in last.items() if step == n] for n in range(len(terms))]


class Kept:
    """All states on the device: x[0..K] on the way there, g[n] in the place of x[n] on the way back.

    ``forget`` drops each state after its last use, for sampling without a backward pass.
    """

    def __init__(self, numbers: Coefficients, x: Tensor, forget: bool = False) -> None:
        self.numbers, self.dtype, self.forget = numbers, x.dtype, forget
        self.states, self.outputs = {0: x.detach()}, dict[int, Tensor]()
        self._shown: tuple[int, Tensor] | None = None
        self._last_output = last_use(numbers.output_terms)
        self._last_state = last_use(numbers.state_terms) if forget else []

    def input(self, j: int) -> Tensor:
        """The network's input at x[j]."""
        if self._shown is not None and self._shown[0] == j:
            return self._shown[1]
        return self.numbers.input(j, self.states[j], self.dtype)

    def step(self, n: int, output: Tensor) -> Tensor:
        """Take F[n], return x[n+1]."""
        # A network in another precision hands its output over in its own dtype; states keep theirs.
        self.outputs[n] = output.to(self.dtype)
        numbers = self.numbers
        terms = [*(self.states[j] for j in numbers.state_terms[n]), *(self.outputs[j] for j in numbers.output_terms[n])]
        new, shown = numbers.next(n, terms, self.dtype)
        self.states[n + 1], self._shown = new, (n + 1, shown)
        for j in self._last_output[n]:
            del self.outputs[j]
        if self.forget:
            for j in self._last_state[n]:
                del self.states[j]
        return new

    def take(self, n: int) -> Tensor:
        """Hand out x[K], which the trajectory then holds no longer."""
        self._shown = None
        self.outputs.clear()
        return self.states.pop(n)

    def turn(self, grad: Tensor, result: Tensor | None) -> None:
        """Begin the way back with g[K]."""
        # From here on slot n holds g[n] instead of x[n], for every n that the loop has passed.
        self.states[self.numbers.steps] = grad.contiguous()

    def mu(self, j: int, dtype: torch.dtype) -> Tensor:
        """mu[j] alone, in the network's dtype, for a network of several calls whose sum is not known yet."""
        return lincomb(self._later(j), self.numbers.columns[j][1]).to(dtype)

    def adjoint(self, j: int, output: Tensor) -> tuple[Tensor, Tensor]:
        """mu[j] in the dtype of the output, and the products (<g[n+1], x[j]>, <g[n+1], F[j]>) for n >= j, [2, K-j]."""
        mu, self.partial, *products = adjoint_step(self.states[j], output, self._later(j), *self.numbers.columns[j])
        return mu, torch.stack(products)

    def settle(self, j: int, vjp: Tensor | None) -> Tensor | None:
        """Put g[j] in the place of x[j]; returns the derivative by c_in[j], where there is such a scale."""
        product = self.numbers.join(j, self.partial, vjp, lambda: self.states[j])
        self.states[j] = self.partial
        return product

    def cotangent(self) -> Tensor:
        """g[0], at the end of the way back."""
        return self.states[0]

    def _later(self, j: int) -> list[Tensor]:
        return [self.states[n] for n in range(j + 1, self.numbers.steps + 1)]
