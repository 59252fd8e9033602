"""The discriminator that is trained beside a solver (GAS: arXiv 2510.17699, section 4.2, with the loss of R3GAN)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..costs import step_cost
from ..distributed import ALONE, Group
from ..iteration import Beside
from ..losses.adversarial import discriminator_loss, fitting, generator_loss
from ..memory import phase
from .directory import load_optimizer, optimizer_tensors, under
from .means import Means

# Seeds of fresh noise lie beyond all that a teacher set or an evaluation is made of.
FRESH = 2**40


@dataclass(frozen=True)
class Adversarial:
    """How a discriminator takes part (the defaults are those of arXiv 2510.17699 for all but CIFAR-10).

    ``weight``: of the generator's loss beside the distillation loss; 0.1 for CIFAR-10. ``rate``: of the discriminator's
    Adam. ``gamma``: of R1 and R2. ``kind``, ``method``: of ``discriminator_loss``. ``fakes``: "fresh", the student's
    samples from noise that it is not trained on, at the cost of K evaluations; or "reuse", those of the update before,
    which cost nothing, but are paired with the teacher's samples of the same noise, and made by a solver that is one
    update old.
    ``warm_up``: updates of the distillation loss alone, without the discriminator. ``micro_batch``: pairs at a time.
    ``precision``: that the discriminator computes in, the samples' own unless given; its weights stay float32.
    """

    weight: float = 1.0
    rate: float = 1e-5
    gamma: float = 0.2
    kind: Literal["relativistic", "non_saturating", "plain"] = "relativistic"
    method: Literal["piecewise", "forward_over_reverse", "double_backward", "random_direction"] = "piecewise"
    fakes: Literal["fresh", "reuse"] = "fresh"
    warm_up: int = 0
    micro_batch: int | None = None
    precision: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, least in (("weight", 0.0), ("gamma", 0.0), ("warm_up", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"the discriminator's rate must be a number above 0, got {self.rate}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch of the discriminator must be one pair or more, got {self.micro_batch}")


class Adversary:
    """A discriminator with its optimiser: its own step first, then its ``loss`` within the solver's gradient.

    The two share no graph, so an iteration's peak is the larger of theirs, not the sum. A gradient that is not finite
    leaves weights and moments as they were, without the host waiting to know.

    Memory: weights, two moments, and while it steps a gradient and what ``discriminator_loss`` takes.

        adversary = Adversary(discriminator_for((3, 32, 32)), Adversarial(weight=0.1), device)
        adversary.gradient(real, draw=lambda: rollout(denoiser, noise, tableau, cond))
        adversary.update()
        loss_backward(denoiser, x, tableau, lambda y, rows: distance(y, real[rows]) + adversary.loss(y, real, rows))
    """

    def __init__(self, discriminator: nn.Module, settings: Adversarial, device: torch.device | str = "cpu") -> None:
        self.discriminator = discriminator.to(device).eval()
        self.settings = settings
        # Fused: one launch, and a step that the device itself leaves out when told of an infinity.
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=settings.rate, fused=True)
        self.logits: Tensor | None = None  # D(real) - D(fake) of the newest step
        self.means = Means()  # the weighted adversarial loss, the discriminator's, |D(real) - D(fake)|, penalties
        self._asked = settings.micro_batch
        self._seen: tuple[Tensor, Tensor] | None = None  # the solver's samples of its newest update, and the teacher's

    def active(self, step: int) -> bool:
        """Whether update ``step``, counted from 0, has an adversarial part."""
        return step >= self.settings.warm_up

    def gradient(self, real: Tensor, draw: Callable[[], Tensor]) -> None:
        """The gradient of a step on the pairs (real[i], fake[i]), [B, *shape] both; the samples get none.

        Fakes are ``draw()``, or those of the update before if they are to be reused. B may be zero.
        """
        self.discriminator.requires_grad_(True)
        self.optimizer.zero_grad()
        if len(real) == 0:
            return
        fake, real = self._seen if self._seen is not None else (draw(), real)
        with phase("discriminator"):
            losses = discriminator_loss(self.discriminator, self._cast(real), self._cast(fake), **self._options)
        self.logits = losses.relativistic
        for name, values in {
            "d_loss": losses.loss, "d_gap": losses.relativistic.abs(), "r1": losses.r1, "r2": losses.r2
        }.items():  # fmt: skip
            self.means.add(name, values)

    def update(self, group: Group = ALONE, share: float = 1.0, slower: float = 1.0) -> None:
        """The step, on the mean of the ranks' gradients by their shares of the batch, at ``slower`` times the rate."""
        network = self.discriminator
        group.mean_gradients_(network, share)
        norms = torch._foreach_norm([p.grad for p in network.parameters() if p.grad is not None])
        infinite = ~torch.isfinite(torch.stack(norms)).all()
        self.means.add("d_skipped", infinite.float()[None])
        for options in self.optimizer.param_groups:
            options["lr"] = self.settings.rate * slower
        self.optimizer.grad_scale, self.optimizer.found_inf = None, infinite.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        network.requires_grad_(False)
        self._seen = None

    def loss(self, samples: Tensor, real: Tensor, rows: slice) -> Tensor:
        """The generator's loss of ``samples`` [b, *shape] against ``real[rows]``, weighted, [b]."""
        self.discriminator.requires_grad_(False)
        if self.settings.fakes == "reuse":
            self._seen = self._seen or (torch.empty_like(real), real)
            self._seen[0][rows] = samples.detach()
        values = self.settings.weight * self._generator(samples, real[rows])
        self.means.add("adversarial", values.detach())
        return values

    @property
    def _options(self) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in ("gamma", "method", "kind", "micro_batch")}

    def _generator(self, samples: Tensor, real: Tensor) -> Tensor:
        given, real = self._cast(samples), self._cast(real)
        return generator_loss(self.discriminator, given, real, kind=self.settings.kind).to(samples.dtype)

    def _cast(self, x: Tensor) -> Tensor:
        return x if self.settings.precision is None else x.to(self.settings.precision)

    def state(self, group: Group = ALONE) -> dict[str, Tensor]:
        """What ``load`` goes on from, bit for bit."""
        tensors = {f"discriminator.{key}": value for key, value in self.discriminator.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        # A rank that had no rows has seen none, and is asked all the same.
        parts = group.gather(None if self._seen is None else [v.cpu() for v in self._seen])
        if seen := [part for part in parts if part is not None]:
            tensors |= {name: torch.cat([part[i] for part in seen]) for i, name in enumerate(("fake", "real"))}
        return tensors

    def load(self, tensors: dict[str, Tensor], group: Group = ALONE) -> None:
        """Inverse of ``state``, on any number of ranks."""
        self.discriminator.load_state_dict(under("discriminator", tensors))
        load_optimizer(self.optimizer, tensors)
        device = next(self.discriminator.parameters()).device
        self._seen = None
        if "fake" in tensors:
            mine = group.part(len(tensors["fake"]))
            self._seen = (tensors["fake"][mine].to(device), tensors["real"][mine].to(device))

    @property
    def pairs(self) -> list[int | None]:
        """Pairs at a time that were asked for, and those taken now: state as well, where memory ran out."""
        return [self._asked, self.settings.micro_batch]

    def take_pairs(self, asked: int | None, now: int | None) -> None:
        """As many pairs at a time as a run of the same wish took before."""
        if asked == self._asked:
            self.settings = replace(self.settings, micro_batch=now)

    def lighten(self, batch: int) -> bool:
        """Take half as many pairs at a time in the steps to come, which changes no gradient; False if it is one."""
        device = next(self.discriminator.parameters()).device
        pairs = self.settings.micro_batch or fitting(self.discriminator, torch.empty(batch, 0, device=device))
        if min(pairs, batch) < 2:
            return False
        self.settings = replace(self.settings, micro_batch=-(-min(pairs, batch) // 2))
        return True

    def fitted(self, shape: Sequence[int], batch: int, steps: int, room: int) -> Beside:
        """``beside``, after as much lightening as makes its own step fit ``room`` bytes, if that can be."""
        beside = self.beside(shape, batch, steps)
        while beside.bytes + beside.samples + beside.step > room and self.lighten(batch):
            beside = self.beside(shape, batch, steps)
        return beside

    def beside(self, shape: Sequence[int], batch: int, steps: int) -> Beside:
        """What an iteration of this batch takes for it, measured in fake tensors, for a plan of the whole."""
        settings, network = self.settings, self.discriminator
        weights, buffers = (sum(t.nbytes for t in ts) for ts in (network.parameters(), network.buffers()))
        states = 4 * batch * math.prod(shape)

        def step(fake: nn.Module) -> None:
            with phase("host"):  # the samples are counted below
                one, other = (torch.empty(batch, *shape) for _ in range(2))
            options = self._options
            if next(network.parameters()).device.type != "cpu":  # what is chosen there
                options["micro_batch"] = settings.micro_batch or batch
            discriminator_loss(fake, self._cast(one), self._cast(other), **options)

        def loss(samples: Tensor, rows: slice) -> Tensor:
            return settings.weight * self._generator(samples, torch.zeros_like(samples))

        reuse = settings.fakes == "reuse"
        peak, flops = step_cost(network, step)
        # Weights and two moments; the gradient lives as long as the step.
        return Beside(
            3 * weights + buffers + (2 * states if reuse else 0), 0 if reuse else states, 0 if reuse else steps, peak,
            flops, loss,
        )  # fmt: skip
