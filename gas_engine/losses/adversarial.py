"""The adversarial half of GAS: losses of discriminator and generator, with gradient penalties at both sides.

Shape legend: B batch, C channels, H W height and width. D(x) is one logit per sample, [B].

| kind | discriminator | generator | |
|---|---|---|---|
| relativistic | softplus(-(D(real) - D(fake))) | softplus(-(D(fake) - D(real))) | arXiv 1807.00734 |
| non_saturating | softplus(-D(real)) + softplus(D(fake)) | softplus(-D(fake)) | arXiv 1406.2661, section 3 |
| plain | softplus(-D(real)) + softplus(D(fake)) | -softplus(D(fake)) | arXiv 1406.2661, equation 1 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gradients import take
from ..networks.r3gan import R3GANDiscriminator
from ._penalty import (
    Pairing,
    double_backward,
    forward_over_reverse,
    logits_of,
    piecewise,
    random_direction,
    without_penalty,
)

__all__ = ["KINDS", "METHODS", "DiscriminatorLosses", "discriminator_loss", "generator_loss"]

CACHE = 8 << 20  # bytes
METHODS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "piecewise": piecewise,
    "forward_over_reverse": forward_over_reverse,
    "double_backward": double_backward,
    "random_direction": random_direction,
}


def _non_saturating(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real) + F.softplus(fake)


# kind -> the discriminator's loss and the generator's, of the logits.
KINDS: dict[str, tuple[Pairing, Pairing]] = {
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
    | forward_over_reverse | 9 | activations and their tangents | networks whose gradient has a forward derivative |
    | double_backward | 6 (7 at the fake side) | the graph of a side, and that of its gradient | any network |
    | random_direction | 6 | the graphs of two calls | nothing: a noisy estimate, see below |

    random_direction: ((D(x + 0.01 e) - D(x)) / 0.01)^2 with e ~ N(0, I), |grad_x D|^2 on average (arXiv 2501.08316
    has this form); its gradient points elsewhere than the true one in any one step, and a warning says so.
    micro_batch: pairs at a time, the result is the same up to rounding; by default all, in `piecewise` on a CPU as many
    as fit the caches.

    Shapes and dtypes: real, fake [B, C, H, W] in the dtype that D shall run in, cond what D takes, tensors of B rows
    (or one) in any container; results [B] in the dtype of D's output, float32 if that is narrower, gradients in that
    of the weights. Raises ValueError for unlike shapes, unknown names, a micro-batch below one, gamma below zero, and
    in `piecewise` for a network that is not piecewise linear, naming the module.

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
    if micro_batch is None:
        micro_batch = fitting(D, real) if method == "piecewise" else len(real)
    run = run if gamma else without_penalty
    parts = [
        run(D, real[rows], fake[rows], take(cond, rows, len(real)), gamma, pairing, 1 / len(real))
        for rows in _rows(len(real), micro_batch)
    ]
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
            given = logits_of(D, given, cond)
    frozen = {name: p.detach() for name, p in D.named_parameters()}
    return pairing(given, logits_of(D, fake, cond, frozen))


def fitting(D: nn.Module, real: Tensor) -> int:
    """Pairs whose largest activation stays near the caches of a CPU: such convolutions are faster, and keep less."""
    if not real.is_cpu or not isinstance(D, R3GANDiscriminator):
        return len(real)
    return max(1, CACHE // (D.largest_activation * real.element_size()))


def _rows(count: int, size: int) -> Iterator[slice]:
    return (slice(i, i + size) for i in range(0, count, size))


def _named(name: str, known: dict[str, Any], what: str) -> Any:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return known[name]
