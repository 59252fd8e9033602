"""Any frozen network behind one call: ``net(x, t, cond) -> F`` with a schedule, a prediction type and a shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .conditioning import SCALES, Classes, Conditioning, Range
from .files import tensors_sha256
from .schedule import Schedule
from .tableau import PREDICTIONS

Network = Callable[[Tensor, Tensor, Any], Tensor]
Weight = float | Tensor  # of a whole call, or [B] of each of its samples


class Denoiser(nn.Module):
    """A network with the facts a sampler needs; the class to build, or to derive from, for one's own model.

    ``function(x, t, cond) -> F``: x [B, *shape] in the state's dtype, t a float64 scalar tensor on x's device (the
    schedule's time; it may require a gradient), cond whatever the model takes (None, class indices [B], a dict of
    tensors). It turns t into its own label and input scale, differentiably, and returns F [B, *shape], the raw
    "noise", "data", "velocity" or "flow" output. A derived class may override ``forward`` and give no function.
    ``network`` is the module whose weights must be frozen; modules that ``function`` closes over are found without it.
    All are put into eval mode. Where the function is a module, or ``forward`` calls ``self.network``, ``lean`` and
    ``checkpoint_blocks`` convert the denoiser as a whole. ``shape`` may be None, which leaves the shape of states
    unchecked. ``conditioning`` says what the sample of a seed is conditioned on; ``classes=n`` is short for
    ``Classes(n)``. ``decoder`` turns states of a latent model into pictures, [B, C, h, w] -> [B, 3, H, W] in [-1, 1];
    it is no part of the network, and stays where it is when that moves. ``name`` goes into solver files.

        denoiser = Denoiser(lambda x, t, cond: net(x, 1000 * t), Schedule.flow(), "flow", shape=(4, 64, 64))
        x = rollout(denoiser, noise, tableau)
    """

    def __init__(
        self,
        function: Network | None,
        schedule: Schedule,
        prediction: str,
        shape: Sequence[int] | None,
        *,
        network: nn.Module | None = None,
        classes: int | None = None,
        conditioning: Conditioning | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        t_eps: float = 1e-3,
        name: str = "custom",
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}; it must be one of {', '.join(PREDICTIONS)}")
        self.function = function
        self.network = network if network is not None or function is None else _modules_in(function)
        self.schedule, self.prediction = schedule, prediction
        self.shape = None if shape is None else tuple(int(n) for n in shape)
        self.conditioning = Classes(classes) if conditioning is None and classes else conditioning
        self.t_eps, self.name = t_eps, name
        self._decoder = (decoder,)  # no child of this module, or it would share the network's precision and views
        # A rebuilt evaluation must repeat the first one: no dropout, no running statistics.
        self.eval()

    calls = 1
    """Of ``base``, whose weighted sum the output is."""
    guidance: float | Range = 1.0
    """The scale of classifier-free guidance, or the ends of a range, of whose three scales each seed has one."""

    @property
    def base(self) -> Denoiser:
        """The denoiser whose calls make up ``terms``: itself, unless it is guided."""
        return self

    @property
    def classes(self) -> int | None:
        """How many there are, of a class-conditional model."""
        return None if self.conditioning is None else self.conditioning.classes

    @property
    def decoder(self) -> Callable[[Tensor], Tensor] | None:
        """From latents to pictures; None for a model whose states are pictures."""
        return self._decoder[0]

    def terms(self, cond: Any) -> list[tuple[Weight, Any]]:
        """Weights and conditions of the calls of ``base`` whose weighted sum the output is."""
        return [(1.0, cond)]

    def facts(self) -> dict[str, Any]:
        """What the samples of a seed depend on, beside weights, schedule and solver; plain JSON."""
        found = {} if self.conditioning is None else self.conditioning.facts()
        if self.guidance != 1.0:
            found = found | {"guidance": self.guidance}
        if isinstance(self.guidance, tuple):
            found = found | {"scales": SCALES}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def told_guidance(self) -> float | Range:
        """The scale, or range, that the samples depend on, also of a model that takes it as an input."""
        told = self.facts().get("guidance", 1.0)
        return tuple(told) if isinstance(told, list) else told

    def fingerprint(self) -> str:
        """SHA-256 of a sample of the weights (at most 1,024 numbers of each tensor) and of what describes the model."""
        weights = {}
        for name, value in self.state_dict().items():
            plain = value.dequantize() if hasattr(type(value), "__tensor_flatten__") else value  # eight-bit weights
            weights[name] = plain.flatten()[:: plain.numel() // 1024 + 1]
        return tensors_sha256(weights, [self.name, self.prediction, self.schedule.config(), self.shape])

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        assert self.function is not None, "a denoiser without a function overrides forward"
        return self.function(x, t, cond)


class EDMDenoiser(Denoiser):
    """An EDM network ``network(x, sigma, labels=None) -> D`` in variance-preserving time, predicting data.

    At time t the network sees ``x / alpha(t)`` at noise level ``sigma(t) / alpha(t)`` (arXiv 2510.17699, appendix;
    the schedule is ``Schedule.edm`` for the network's own sigma_min and sigma_max). ``cond``: class indices [B], or
    one-hot labels [B, label_dim]. A network that was trained with labels left out can be guided: the index label_dim
    says no class. Weights stay where they are; nothing is copied.

        denoiser = EDMDenoiser(build_edm(kwargs, state_dict))
        D = denoiser(x, torch.tensor(0.5))
    """

    def __init__(
        self, network: nn.Module, t_eps: float = 1e-3, name: str = "edm", shape: Sequence[int] | None = None
    ) -> None:
        sigma_min, sigma_max = float(getattr(network, "sigma_min", 0.0)), float(getattr(network, "sigma_max", "inf"))
        if shape is None and hasattr(network, "img_channels"):
            shape = (network.img_channels, network.img_resolution, network.img_resolution)  # type: ignore[assignment]
        classes, left_out = getattr(network, "label_dim", 0), getattr(network, "label_dropout", 0.0)
        super().__init__(
            None, Schedule.edm(t_eps, sigma_min, sigma_max), "data", shape, network=network,
            conditioning=Classes(classes, null=classes if left_out else None) if classes else None, t_eps=t_eps,
            name=name,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        assert self.network is not None
        alpha, sigma, _ = self.schedule(t)
        if cond is not None and self.classes and cond.ndim == 1:
            assert self.conditioning is not None
            guidable = self.conditioning.null is not None
            cond = nn.functional.one_hot(cond.long(), self.classes + guidable)[:, : self.classes]  # of no class, zeros
        return self.network(x / alpha.to(x.dtype), sigma / alpha, cond)


def _modules_in(function: Network) -> nn.Module | None:
    """Modules that a plain function closes over or finds among its globals: their weights count as the model's."""
    if isinstance(function, nn.Module) or not inspect.isfunction(function):
        return None
    variables = inspect.getclosurevars(function)
    found = [v for v in (*variables.nonlocals.values(), *variables.globals.values()) if isinstance(v, nn.Module)]
    return nn.ModuleList(found) if found else None


def weighted_sum(outputs: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """``w a + (1 - w) b`` of two outputs [B, ...], differentiable in them; w is a number, or [B] of them.

    In one pass, and as ``b + w (a - b)``: a guidance scale of 7.5 would make the rounding of each product, and with it
    that of the whole sum, as much larger.
    """
    (a, b), w = outputs, weights[0]
    return torch.lerp(b, a, each(w, b) if isinstance(w, Tensor) else w)


def each(weight: Weight, like: Tensor) -> Tensor:
    """The weight in the dtype of samples [B, ...], with as many dimensions."""
    if not isinstance(weight, Tensor):
        return torch.tensor(weight, dtype=like.dtype)  # of no dimensions, on the host: nothing waits for it
    return weight.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def seeded(denoiser: Denoiser, seeds: Sequence[int], conditions: bool = True) -> tuple[Tensor, Any]:
    """Noise [B, *shape] (float32, CPU) and conditions of the given seeds, each from a generator of its own.

    One CPU generator per seed makes a sample independent of batch size, device and number of processes. What the
    ``conditioning`` draws, such as a class, comes next from the same generator; ``conditions=False`` leaves it out.
    """
    if denoiser.shape is None:
        raise ValueError(f"{denoiser.name} does not say the shape of its states; give shape= to draw noise from seeds")
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    noise = torch.stack([torch.randn(denoiser.shape, generator=generator) for generator in generators])
    if denoiser.conditioning is None or not conditions:
        return noise, None
    return noise, denoiser.conditioning.draw(seeds, generators)
