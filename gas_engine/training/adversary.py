"""The discriminator that is trained beside a solver (GAS: arXiv 2510.17699, section 4.2, with the loss of R3GAN)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..costs import step_cost
from ..iteration import Beside
from ..losses.adversarial import discriminator_loss, generator_loss
from ..memory import phase
from .directory import load_optimizer, optimizer_tensors

Sampler = Callable[[Sequence[int], Any], Tensor]
# Seeds of fresh noise lie beyond all that a teacher set or an evaluation is made of.
FRESH = 2**40


@dataclass(frozen=True)
class Adversarial:
    """How a discriminator takes part (the defaults are those of arXiv 2510.17699 for CIFAR-10).

    ``weight``: of the generator's loss beside the distillation loss. ``rate``: of the discriminator's Adam. ``gamma``:
    of R1 and R2. ``kind``, ``method``: of ``discriminator_loss``. ``fakes``: "fresh", the student's samples from noise
    that it is not trained on, at the cost of K evaluations; or "reuse", those of the update before, which cost nothing,
    but are paired with the teacher's samples of the same noise, and made by a solver that is one update old.
    ``warm_up``: updates of the distillation loss alone, without the discriminator. ``micro_batch``: pairs at a time.
    ``precision``: that the discriminator computes in; its weights stay float32.
    """

    weight: float = 0.1
    rate: float = 1e-5
    gamma: float = 0.2
    kind: Literal["relativistic", "non_saturating", "plain"] = "relativistic"
    method: Literal["piecewise", "forward_over_reverse", "double_backward"] = "piecewise"
    fakes: Literal["fresh", "reuse"] = "fresh"
    warm_up: int = 0
    micro_batch: int | None = None
    precision: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, least in (("weight", 0.0), ("gamma", 0.0), ("warm_up", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.rate > 0:
            raise ValueError(f"the discriminator's rate must be above 0, got {self.rate}")


class Adversary:
    """A discriminator with its optimiser: ``update`` first, then ``loss`` within the solver's gradient.

    The two share no graph, so an iteration's peak is the larger of theirs, not the sum. A gradient that is not finite
    leaves weights and moments as they were, without the host waiting to know.

        adversary = Adversary(discriminator_for((3, 32, 32)), Adversarial(weight=0.1), device)
        adversary.update(fake, real)
        loss_backward(denoiser, x, tableau, lambda y, rows: distance(y, real[rows]) + adversary.loss(y, real, rows))
    """

    def __init__(self, discriminator: nn.Module, settings: Adversarial, device: torch.device | str = "cpu") -> None:
        self.discriminator = discriminator.to(device).eval()
        self.settings = settings
        # Fused: one launch, and a step that the device itself leaves out when told of an infinity.
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=settings.rate, fused=True)
        self.reduce: Callable[[nn.Module], None] = lambda module: None
        self._seen: Tensor | None = None  # this update's samples, to be judged in the next one, and the teacher's
        self._real: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def active(self, step: int) -> bool:
        """Whether update ``step``, counted from 0, has an adversarial part."""
        return step >= self.settings.warm_up

    def take_part(self, real: Tensor, cond: Any, seeds: Sequence[int], sample: Sampler) -> None:
        """The discriminator's step of one update, against the teacher's samples ``real`` [B, *shape].

        ``sample(seeds, cond)``: the student's samples from the noise of these seeds, without gradient.
        """
        if self.settings.fakes == "reuse" and self._seen is not None and self._real is not None:
            self.update(self._seen, self._real)
        else:
            self.update(sample(seeds, cond), real)
        self._seen, self._real = None, None

    def update(self, fake: Tensor, real: Tensor) -> None:
        """One step on the pairs (real[i], fake[i]), [B, *shape] both, without a gradient into the samples."""
        settings, network = self.settings, self.discriminator
        network.requires_grad_(True)
        self.optimizer.zero_grad()
        losses = discriminator_loss(
            network, real.to(settings.precision), fake.to(settings.precision), **self._options
        )  # fmt: skip
        self.reduce(network)
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        finite = torch.isfinite(torch.stack(torch._foreach_norm(grads))).all()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        network.requires_grad_(False)
        self._add("d_loss", losses.loss)
        self._add("d_gap", losses.relativistic.abs())
        self._add("r1", losses.r1)
        self._add("r2", losses.r2)

    def loss(self, samples: Tensor, real: Tensor, rows: slice) -> Tensor:
        """The generator's loss of ``samples`` [b, *shape] against ``real[rows]``, weighted."""
        settings = self.settings
        self.discriminator.requires_grad_(False)
        if settings.fakes == "reuse":
            if self._seen is None:
                self._seen, self._real = torch.empty_like(real), real
            self._seen[rows] = samples.detach()
        values = self._generator(samples, real[rows])
        self._add("adversarial", values.detach())
        return settings.weight * values

    @property
    def _options(self) -> dict[str, Any]:
        settings = self.settings
        return {"gamma": settings.gamma, "method": settings.method, "kind": settings.kind,
                "micro_batch": settings.micro_batch}  # fmt: skip

    def _generator(self, samples: Tensor, real: Tensor) -> Tensor:
        kind, precision = self.settings.kind, self.settings.precision
        return generator_loss(self.discriminator, samples.to(precision), real.to(precision), kind=kind).to(
            samples.dtype
        )

    def _add(self, name: str, values: Tensor) -> None:
        total = values.sum(dtype=torch.float64)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + len(values)

    def read(self) -> dict[str, float]:
        """Means since the last call, of what ``update`` and ``loss`` saw; this waits for the device."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, numbers) from which ``load`` goes on bit for bit."""
        tensors = {f"discriminator.{key}": value for key, value in self.discriminator.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        if self._seen is not None and self._real is not None:
            tensors |= {"seen": self._seen, "real": self._real}
        return tensors, {}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        prefix = "discriminator."
        weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        self.discriminator.load_state_dict(weights)
        load_optimizer(self.optimizer, tensors)
        device = next(self.discriminator.parameters()).device
        self._seen, self._real = (tensors[n].to(device) if n in tensors else None for n in ("seen", "real"))

    def beside(self, shape: Sequence[int], batch: int, steps: int) -> Beside:
        """What an iteration of this batch takes for it, measured in fake tensors, for a plan of the whole."""
        settings, network = self.settings, self.discriminator
        weights, buffers = (sum(t.nbytes for t in ts) for ts in (network.parameters(), network.buffers()))
        states = 4 * batch * math.prod(shape)

        def step(fake: nn.Module) -> None:
            with phase("host"):  # the samples are counted below
                one, other = (torch.empty(batch, *shape) for _ in range(2))
            discriminator_loss(fake, one.to(settings.precision), other.to(settings.precision), **self._options)

        def loss(samples: Tensor, rows: slice) -> Tensor:
            return settings.weight * self._generator(samples, torch.zeros_like(samples))

        reuse = settings.fakes == "reuse"
        peak, flops = step_cost(network, step)
        # Weights and two moments; the gradient lives as long as the step.
        return Beside(
            3 * weights + buffers + (2 * states if reuse else 0), 0 if reuse else states, 0 if reuse else steps, peak,
            flops, loss,
        )  # fmt: skip
