"""One micro-batch of the discriminator's loss with its penalties, by each of the methods.

A method takes D, real, fake, cond, gamma, the pairing, and the weight of each sample in the mean; it adds to the
gradients of D's parameters and gives back D(real), D(fake), |grad_x D(real)|^2 and |grad_x D(fake)|^2, [B] each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from ..networks.r3gan import R3GANDiscriminator
from ._piecewise import pieces

Pairing = Callable[[Tensor, Tensor], Tensor]  # logits of real and fake, [B] each -> loss [B]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def double_backward(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: Pairing, weight: float
) -> Four:
    """Autograd through the gradient."""

    def penalty(x: Tensor, logits: Tensor) -> Tensor:
        return _squared(torch.autograd.grad(logits.sum(), x, create_graph=True)[0])

    return _one_side_at_a_time(D, real, fake, cond, gamma, pairing, weight, penalty)


def random_direction(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: Pairing, weight: float
) -> Four:
    """A finite difference in a random direction."""
    warnings.warn(
        "random_direction estimates the gradient penalty from one random direction a sample: right on average, far "
        "from the true gradient in any one step. Use method='piecewise' or 'double_backward' for the exact one",
        stacklevel=3,
    )
    step = 0.01

    def penalty(x: Tensor, logits: Tensor) -> Tensor:
        return ((logits_of(D, x + step * torch.randn_like(x), cond) - logits) / step).square()

    return _one_side_at_a_time(D, real, fake, cond, gamma, pairing, weight, penalty)


def _one_side_at_a_time(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: Pairing, weight: float, penalty: Pairing
) -> Four:
    """The graph of one side, while the other's logits are constants."""

    def side(x: Tensor, against: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        logits = logits_of(D, x, cond)
        r = penalty(x, logits)
        _backward(D, weight * (against(logits) + gamma / 2 * r).sum())
        return logits.detach(), r.detach()

    with torch.no_grad():
        b = logits_of(D, fake, cond)
    a, r1 = side(real, lambda a: pairing(a, b))
    b, r2 = side(fake, lambda b: pairing(a, b))
    return a, b, r1, r2


def forward_over_reverse(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: Pairing, weight: float
) -> Four:
    """The derivative, along e, of the weight gradient at x + e gamma v with cotangent 1 + e s.

    With v = grad_x D and s = d pairing / d logit that is s dD/dw + gamma d(v . grad_x D)/dw, v held constant: the
    gradient of the loss (Pearlmutter 1994).
    """
    frozen = {name: p.detach() for name, p in D.named_parameters()}
    parameters = [p for p in D.parameters() if p.requires_grad]

    def first(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        logits = logits_of(D, x, cond, frozen)
        return logits.detach(), torch.autograd.grad(logits.sum(), x)[0]

    (a, v_real), (b, v_fake) = first(real), first(fake)
    for x, v, s in zip((real, fake), (v_real, v_fake), _slopes(pairing, a, b), strict=True):
        with forward_ad.dual_level():
            cotangent = forward_ad.make_dual(torch.ones_like(s), s)

            def gradients(x: Tensor, cotangent: Tensor, again: bool) -> Any:
                logits = logits_of(D, x, cond)
                return torch.autograd.grad(logits, parameters, cotangent, allow_unused=True, create_graph=again)

            moving = forward_ad.make_dual(x, gamma * v)
            try:
                found = gradients(moving, cotangent, False)
            except NotImplementedError:  # of some gradients PyTorch knows the derivative only where a tape asks for it
                found = gradients(moving, cotangent, True)
            for p, g in zip(parameters, found, strict=True):
                tangent = None if g is None else forward_ad.unpack_dual(g).tangent
                if tangent is not None:
                    accumulate(p, weight * tangent.detach())
    return a, b, _squared(v_real), _squared(v_fake)


@torch.no_grad()
def piecewise(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: Pairing, weight: float
) -> Four:
    """Three sweeps over the network at the signs of its activations, see `_pieces`."""
    if isinstance(D, R3GANDiscriminator):
        D.check(real)
    real, fake = _dense(real), _dense(fake)
    at_real, at_fake = pieces(D, accumulate, cond), pieces(D, accumulate, cond)
    a, b = _one_each(at_real.forward(real), real), _one_each(at_fake.forward(fake), fake)
    penalties = []
    for side, x, s in zip((at_real, at_fake), (real, fake), _slopes(pairing, a, b), strict=True):
        s = (weight * s).to(x.dtype)
        v = side.pull(torch.ones_like(s), s)
        penalties.append(_squared(v))
        side.push(torch.addcmul(weight * gamma * v, s.view(-1, *[1] * (x.dim() - 1)), x), s)
    return a, b, *penalties  # type: ignore[return-value]


def without_penalty(
    D: nn.Module, real: Tensor, fake: Tensor, cond: Any, gamma: float, pairing: Pairing, weight: float
) -> Four:
    """What every method is when gamma is zero."""
    a, b = logits_of(D, real, cond), logits_of(D, fake, cond)
    _backward(D, weight * pairing(a, b).sum())
    return a.detach(), b.detach(), torch.zeros_like(a).detach(), torch.zeros_like(b).detach()


def logits_of(D: nn.Module, x: Tensor, cond: Any, weights: dict[str, Tensor] | None = None) -> Tensor:
    """D(x), or D(x, cond), with other weights if they are given."""
    args = (x,) if cond is None else (x, cond)
    return _one_each(D(*args) if weights is None else functional_call(D, weights, args), x)


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add to `.grad`, in the parameter's dtype, as the tape does."""
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


def _one_each(logits: Tensor, x: Tensor) -> Tensor:
    if logits.shape != x.shape[:1]:
        raise ValueError(f"D must return one logit a sample, {list(x.shape[:1])}, got {list(logits.shape)}")
    return _wide(logits)


def _squared(v: Tensor) -> Tensor:
    return _wide(v).square().flatten(1).sum(1)


def _wide(x: Tensor) -> Tensor:
    """What is summed and compared has float32's digits, also where the network has fewer."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _slopes(pairing: Pairing, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The derivatives of the adversarial loss in its logits, [B] each."""
    with torch.enable_grad():
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        return torch.autograd.grad(pairing(a, b).sum(), (a, b))


def _dense(x: Tensor) -> Tensor:
    """On a CPU convolutions of one sample are fastest in channels_last; more samples stay contiguous."""
    channels_last = x.dim() == 4 and len(x) == 1 and x.is_cpu
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _backward(D: nn.Module, loss: Tensor) -> None:
    torch.autograd.backward(loss, inputs=[p for p in D.parameters() if p.requires_grad])
