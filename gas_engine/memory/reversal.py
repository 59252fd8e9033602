"""`Reversible`: two states, and the way back to all the others.

    x[n+1] = A[n,n-1] x[n-1] + A[n,n] x[n] + B[n,n] F[n]          forward, n >= 1; the first step has no x[-1]
    x[n-1] = (x[n+1] - A[n,n] x[n] - B[n,n] F[n]) / A[n,n-1]      backward, with the F[n] that the VJP rebuilds anyway

Rounding would grow by 1/|A[n,n-1]| a step. Residual codes bring the very same bits back; so do, but for elements that
are next to nothing beside the terms of their sum, two states in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import ResidualCodes, adjoint_step, lincomb, reversible_inverse, reversible_step
from .trajectory import Coefficients


class BitsLost:
    """What the residual codes of reversible rollouts hold: the bits that rounding would have lost.

    ``mean``: bits an element and step, log2 of the distance in units in the last place (a sign and a zero included);
    ``escaped``: the share of elements that no int8 code could hold. Counted on the device; reading waits for it.

        meter = BitsLost()
        rollout(denoiser, noise, tableau, memory=MemoryPolicy(trajectory="reversible", meter=meter))
        print(meter.mean, meter.escaped)
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self._bits: Tensor | float = 0.0
        self._elements = self._escapes = 0

    def add(self, codes: ResidualCodes) -> None:
        """Count the codes of one step."""
        sizes = torch.bincount(codes.code.flatten().to(torch.int16).abs_(), minlength=129)[:129].double()
        self._bits = self._bits + sizes @ torch.log2(2 * torch.arange(129.0, dtype=torch.float64) + 1).to(sizes.device)
        self._elements += codes.code.numel()
        self._escapes += codes.where.numel()

    @property
    def mean(self) -> float:
        """Bits an element and step, on average."""
        return float(self._bits) / max(self._elements, 1)

    @property
    def escaped(self) -> float:
        """Share of the elements whose code did not fit a byte."""
        return self._escapes / max(self._elements, 1)


class Reversible:
    """Two states on the device, and a byte an element and step of codes (or the two in float64, ``carry``).

    Entries of A and B outside of the band are constants here: their products come back as zeros.
    """

    def __init__(
        self, numbers: Coefficients, A: Tensor, B: Tensor, x: Tensor, carry: bool, meter: BitsLost | None
    ) -> None:
        _check_band(A, B)
        if carry and x.dtype == torch.float64:
            raise ValueError(
                "carry=True holds states in float64, and these are float64 already, with nothing finer to hold them; "
                "use the codes (carry=False)"
            )
        self.numbers, self.dtype, self.carry, self.meter = numbers, x.dtype, carry, meter
        below, a, b = A.diagonal(-1), A.diagonal(), B.diagonal()
        rows = torch.stack([torch.cat([below.new_zeros(1), below]), a, b], 1)
        self.coefficients = rows.to(x.device, non_blocking=True).unbind()
        self.low = self.high = x.detach().to(torch.float64 if carry else x.dtype)
        self.codes: dict[int, ResidualCodes | None] = {}
        self.seal = _sums(self.low) if carry else _seal(x.detach())
        self.g: list[Tensor] = []  # g[j+1], g[j+2]

    def input(self, j: int) -> Tensor:
        """The network's input at the newer state on the way there, at the older on the way back."""
        return self.numbers.input(j, self.low if self.g else self.high, self.dtype)

    def step(self, n: int, output: Tensor) -> Tensor:
        """Take F[n], return x[n+1]."""
        output, codes = output.to(self.dtype), None
        if n == 0:
            new = lincomb([self.high, output], self.coefficients[0][1:])
        else:
            new, codes = reversible_step(self.low, self.high, output, self.coefficients[n], codes=not self.carry)
        self.codes[n] = codes
        if codes is not None and self.meter is not None:
            self.meter.add(codes)
        self.low, self.high = self.high, new
        return new.to(self.dtype)

    def take(self, n: int) -> Tensor:
        """Hand out x[K], which comes back with ``turn``; float64 carries stay."""
        result = self.high.to(self.dtype)
        if not self.carry:
            del self.high
        return result

    def turn(self, grad: Tensor, result: Tensor | None) -> None:
        """Begin the way back with g[K]."""
        if not self.carry:
            assert result is not None
            self.high = result.detach()
        self.g = [grad.contiguous()]

    def mu(self, j: int, dtype: torch.dtype) -> Tensor:
        """mu[j] = B[j,j] g[j+1]."""
        return lincomb(self.g[:1], self.coefficients[j][2:]).to(dtype)

    def adjoint(self, j: int, output: Tensor) -> tuple[Tensor, Tensor]:
        """mu[j] and the products; takes the step from x[j+1] and x[j] back to x[j-1]."""
        state, count = self.low, len(self.g)
        columns = [column[:count] for column in self.numbers.columns[j]]
        mu, self.partial, *products = adjoint_step(state.to(self.dtype), output, self.g, *columns)
        padded = torch.zeros(2, self.numbers.steps - j, dtype=torch.float64, device=mu.device)
        padded[:, :count] = torch.stack(products)
        padded[1, 1:] = 0.0
        if j > 0:
            codes = self.codes.pop(j)
            self.low = reversible_inverse(self.high, state, output.to(self.dtype), self.coefficients[j], codes)
            self.high = state
            if j == 1:
                _check_seal(self.low, self.seal)
        return mu, padded

    def settle(self, j: int, vjp: Tensor | None) -> Tensor | None:
        """g[j]; returns the derivative by c_in[j], where there is such a scale."""
        product = self.numbers.join(j, self.partial, vjp, lambda: self.high if j > 0 else self.low)
        self.g = [self.partial, *self.g[:1]]
        return product

    def cotangent(self) -> Tensor:
        """g[0]."""
        return self.g[0]


def _check_band(A: Tensor, B: Tensor) -> None:
    """Only A[n,n], A[n,n-1] != 0 and B[n,n] may differ from zero."""
    if bool(A.tril(-2).any()) or bool(B.tril(-1).any()):
        raise ValueError(
            "trajectory='reversible' needs a band tableau, x[n+1] from x[n], x[n-1] and F[n] alone, and this one has a "
            "longer history: a dense solver, the Generalized Solver included, is not reversible; train a BELMSolver "
            "(--student belm), or use trajectory='keep' or 'offload'"
        )
    lost = [n + 1 for n, a in enumerate(A.diagonal(-1).tolist()) if a == 0.0]
    if lost:
        raise ValueError(
            f"trajectory='reversible' needs A[n,n-1] != 0, and it is 0 at n = {lost}: nothing is left of x[n-1]"
        )


def _seal(x: Tensor) -> Tensor:
    """A checksum of the bits of x, [2], order-dependent, in a fraction of a pass."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.contiguous().view(whole).flatten()
    weighted = torch.stack([row.sum(dtype=torch.int64) for row in bits.split(65_521)])
    return torch.stack([weighted.sum(), (weighted * torch.arange(1, len(weighted) + 1, device=x.device)).sum()])


def _sums(x: Tensor) -> Tensor:
    """The sums of x and of its absolute values over every 4,096 elements, float64 [2, blocks]."""
    blocks = nn.functional.pad(x.double().flatten(), (0, -x.numel() % 4096)).view(-1, 4096)
    return torch.stack([blocks.sum(1), blocks.abs().sum(1)])


def _check_seal(x: Tensor, seal: Tensor) -> None:
    """Whether x is what was sealed: by its bits, or, a float64 carry, within float64's own rounding.

    A float32 network that strays in its last bit moves a sum by 1e-9 of its absolute one, float64 by 1e-16 times the
    growth of the walk.
    """
    if seal.is_floating_point():
        sums = _sums(x)
        same = bool(((sums[0] - seal[0]).abs() <= 1e-11 * seal[1]).all())
    else:
        same = torch.equal(_seal(x), seal)
    if not same:
        raise RuntimeError(
            "the state that the reversible trajectory came back to is not the one it started from, so these gradients "
            "would be wrong: the network does not repeat its own bits; try torch.use_deterministic_algorithms(True), "
            "or trajectory='keep'; with carry=True the walk may be beyond float64: codes (carry=False) lose no bit"
        )
