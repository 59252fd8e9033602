"""The adversarial half of GAS: losses of discriminator and generator, with gradient penalties at both sides.

Shape legend: B batch, C channels, H W height and width. D(x) is one logit per sample, [B].

| kind | discriminator | generator | |
|---|---|---|---|
| relativistic | softplus(-(D(real) - D(fake))) | softplus(-(D(fake) - D(real))) | arXiv 1807.00734 |
| non_saturating | softplus(-D(real)) + softplus(D(fake)) | softplus(-D(fake)) | arXiv 1406.2661, section 3 |
| plain | softplus(-D(real)) + softplus(D(fake)) | -softplus(D(fake)) | arXiv 1406.2661, equation 1 |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from ._piecewise import pieces

__all__ = ["KINDS", "METHODS", "DiscriminatorLosses", "discriminator_loss", "generator_loss"]

Side = tuple[Tensor, Tensor]  # logits [B] and penalty [B]


def _non_saturating(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real) + F.softplus(fake)


# kind -> the discriminator's loss and the generator's, of the logits.
_Pairing = Callable[[Tensor, Tensor], Tensor]
KINDS: dict[str, tuple[_Pairing, _Pairing]] = {
    "relativistic": (lambda real, fake: F.softplus(fake - real), lambda real, fake: F.softplus(real - fake)),
    "non_saturating": (_non_saturating, lambda real, fake: F.softplus(-fake)),
    "plain": (_non_saturating, lambda real, fake: -F.softplus(fake)),
}


@dataclass(frozen=True)
class DiscriminatorLosses:
    """Per sample [B], detached: loss = adversarial + gamma / 2 (r1 + r2); relativistic = D(real) - D(fake)."""

    loss: Tensor
    adversarial: Tensor
    relativistic: Tensor
    r1: Tensor
    r2: Tensor
    real_logits: Tensor
    fake_logits: Tensor


def discriminator_loss(
    D: nn.Module,
    real: Tensor,
    fake: Tensor,
    cond: Any = None,
    gamma: float = 0.2,
    method: str = "piecewise",
    kind: str = "relativistic",
    micro_batch: int | None = None,
) -> DiscriminatorLosses:
    """Loss of the discriminator; the gradient of its mean is added to the `.grad` of D's parameters.

    loss = pairing(D(real), D(fake)) + gamma / 2 (|grad_x D(real)|^2 + |grad_x D(fake)|^2), sums over C, H, W: R1 and R2
    of arXiv 2501.05441, section 2. Real and fake are constants here, whatever graph they come with. gamma = 0 leaves
    the penalties out (and reports them as zeros).

    | method | passes of each convolution, a side | keeps | exact for |
    |---|---|---|---|
    | piecewise | 4 | cotangents of convolutions, bits | piecewise linear networks; refuses others |
    | forward_over_reverse | 9 | activations and their tangents | any network |
    | double_backward | 6 (7 at the fake side) | the graph of a side, and that of its gradient | any network |
    | random_direction | 6 | the graphs of two calls | nothing: a noisy estimate, see below |

    random_direction: ((D(x + 0.01 e) - D(x)) / 0.01)^2 with e ~ N(0, I), |grad_x D|^2 on average (arXiv 2501.08316
    has this form); its gradient points elsewhere than the true one in any one step, and a warning says so.
    micro_batch: pairs at a time, the result is the same up to rounding; by default all, in `piecewise` as many as fit
    the caches.

    Shapes and dtypes: real, fake [B, C, H, W] floating, cond what D takes, with B in front; results [B] in the dtype of
    D's output. Raises ValueError for unlike shapes, unknown names, a micro-batch below one, gamma below zero, and in
    `piecewise` for a network that is not piecewise linear, naming the module.

        losses = discriminator_loss(D, real, fake)
        optimizer.step(), optimizer.zero_grad()
    """
    if real.shape != fake.shape or len(real) == 0:
        raise ValueError(f"real and fake come in pairs of one shape, got {list(real.shape)} and {list(fake.shape)}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be zero or more, got {gamma}")
    pairing, _ = _named(kind, KINDS, "kind of adversarial loss")
    run = _named(method, METHODS, "method for the gradient penalty")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be one pair or more, got {micro_batch}")
    real, fake = real.detach(), fake.detach()
    parts = []
    for rows in _rows(len(real), micro_batch or len(real)):
        pair = D, real[rows], fake[rows], _of(cond, rows, len(real))
        parts.append(
            run(*pair, gamma, pairing, 1 / len(real)) if gamma else _without_penalty(*pair, pairing, 1 / len(real))
        )
    a, b, r1, r2 = (torch.cat(column) for column in zip(*parts, strict=True))
    adversarial = pairing(a, b)
    return DiscriminatorLosses(adversarial + gamma / 2 * (r1 + r2), adversarial, a - b, r1, r2, a, b)


def generator_loss(
    D: nn.Module, fake: Tensor, real_logits_or_real: Tensor, cond: Any = None, kind: str = "relativistic"
) -> Tensor:
    """Loss [B] of the generator, differentiable in fake; no gradient reaches D's weights.

    `real_logits_or_real`: D's logits [B] (as `discriminator_loss` reports them, or newer ones), or real samples of
    fake's shape. D's weights count as frozen: an `R3GANDiscriminator` keeps one bit for each activation, other
    networks what PyTorch keeps for an input's gradient. Raises ValueError for an unknown kind and shapes that fit
    neither.

        loss = generator_loss(D, student, teacher).mean()
    """
    _, pairing = _named(kind, KINDS, "kind of adversarial loss")
    given = real_logits_or_real.detach()
    if given.shape not in (fake.shape, fake.shape[:1]):
        raise ValueError(
            f"give the logits of the real samples, {list(fake.shape[:1])}, or the samples, {list(fake.shape)}; "
            f"got {list(given.shape)}"
        )
    if given.dim() > 1:
        with torch.no_grad():
            given = D(given, cond)
    frozen = {name: p.detach() for name, p in D.named_parameters()}
    return pairing(given, functional_call(D, frozen, (fake, cond)))


def _double_backward(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: _Pairing, weight: float
) -> tuple[Tensor, ...]:
    """Autograd through the gradient, at one side while the other's logits are constants."""

    def side(x: Tensor, against: Callable[[Tensor], Tensor]) -> Side:
        x = x.clone().requires_grad_()
        logits = D(x, cond)
        (v,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        penalty = v.square().flatten(1).sum(1)
        _backward(D, weight * (against(logits) + gamma / 2 * penalty).sum())
        return logits.detach(), penalty.detach()

    with torch.no_grad():
        b = D(fake, cond)
    a, r1 = side(real, lambda a: pairing(a, b))
    b, r2 = side(fake, lambda b: pairing(a, b))
    return a, b, r1, r2


def _forward_over_reverse(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: _Pairing, weight: float
) -> tuple[Tensor, ...]:
    """The derivative, along e, of the weight gradient at x + e gamma v with cotangent 1 + e s.

    With v = grad_x D and s = d pairing / d logit that is s dD/dw + gamma d(v . grad_x D)/dw, v held constant: the
    gradient of the loss (Pearlmutter 1994).
    """
    frozen = {name: p.detach() for name, p in D.named_parameters()}
    parameters = [p for p in D.parameters() if p.requires_grad]

    def first(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        logits = functional_call(D, frozen, (x, cond))
        return logits.detach(), torch.autograd.grad(logits.sum(), x)[0]

    (a, v_real), (b, v_fake) = first(real), first(fake)
    for x, v, s in zip((real, fake), (v_real, v_fake), slopes(pairing, a, b), strict=True):
        with forward_ad.dual_level():
            logits = D(forward_ad.make_dual(x, gamma * v), cond)
            cotangent = forward_ad.make_dual(torch.ones_like(s), s)
            gradients = torch.autograd.grad(logits, parameters, cotangent, allow_unused=True)
            for p, g in zip(parameters, gradients, strict=True):
                tangent = None if g is None else forward_ad.unpack_dual(g).tangent
                accumulate(p, None if tangent is None else weight * tangent)
    return a, b, *(v.square().flatten(1).sum(1) for v in (v_real, v_fake))


def _random_direction(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: _Pairing, weight: float
) -> tuple[Tensor, ...]:
    warnings.warn(
        "random_direction estimates the gradient penalty from one random direction a sample: right on average, far "
        "from the true gradient in any one step. Use method='piecewise' or 'double_backward' for the exact one",
        stacklevel=3,
    )
    step = 0.01

    def side(x: Tensor, against: Callable[[Tensor], Tensor]) -> Side:
        logits = D(x, cond)
        penalty = ((D(x + step * torch.randn_like(x), cond) - logits) / step).square()
        _backward(D, weight * (against(logits) + gamma / 2 * penalty).sum())
        return logits.detach(), penalty.detach()

    with torch.no_grad():
        b = D(fake, cond)
    a, r1 = side(real, lambda a: pairing(a, b))
    b, r2 = side(fake, lambda b: pairing(a, b))
    return a, b, r1, r2


@torch.no_grad()
def _piecewise(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: _Pairing, weight: float
) -> tuple[Tensor, ...]:
    """The two sides at the signs of their activations, see `_piecewise`."""
    real, fake = (_dense(x) for x in (real, fake))
    sides = [pieces(D, accumulate, cond) for _ in range(2)]
    a, b = (side.forward(x) for side, x in zip(sides, (real, fake), strict=True))
    penalties = []
    for side, x, s in zip(sides, (real, fake), slopes(pairing, a, b), strict=True):
        s = weight * s
        v = side.pull(torch.ones_like(s), s)
        penalties.append(v.square().flatten(1).sum(1))
        side.push(torch.addcmul(weight * gamma * v, s[:, None, None, None], x), s)
    return a, b, *penalties


def _without_penalty(D: nn.Module, real: Tensor, fake: Tensor, cond: Any, pairing: _Pairing, weight: float) -> Any:
    a, b = D(real, cond), D(fake, cond)
    _backward(D, weight * pairing(a, b).sum())
    return a.detach(), b.detach(), torch.zeros_like(a), torch.zeros_like(b)


METHODS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "piecewise": _piecewise,
    "forward_over_reverse": _forward_over_reverse,
    "double_backward": _double_backward,
    "random_direction": _random_direction,
}


def slopes(pairing: _Pairing, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of the adversarial loss in its logits, [B] each."""
    with torch.enable_grad():
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        return torch.autograd.grad(pairing(a, b).sum(), (a, b))  # type: ignore[return-value]


def _dense(x: Tensor) -> Tensor:
    """On a CPU convolutions of one sample are fastest in channels_last; more samples stay contiguous."""
    return x.contiguous(memory_format=torch.channels_last) if len(x) == 1 and x.is_cpu else x.contiguous()


def accumulate(parameter: Tensor, gradient: Tensor | None) -> None:
    """Add to `.grad`, in the parameter's dtype, as the tape does."""
    if gradient is None or not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


def _backward(D: nn.Module, loss: Tensor) -> None:
    torch.autograd.backward(loss, inputs=[p for p in D.parameters() if p.requires_grad])


def _rows(count: int, size: int) -> Iterator[slice]:
    return (slice(i, i + size) for i in range(0, count, size))


def _of(cond: Any, rows: slice, count: int) -> Any:
    """The condition of these samples: tensors and lists with one entry a sample are cut, anything else is shared."""
    return cond[rows] if isinstance(cond, Tensor | list | tuple) and len(cond) == count else cond


def _named(name: str, known: dict[str, Any], what: str) -> Any:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return known[name]
