"""EDM, VP and VE preconditioning: a U-Net as a denoiser D(x; sigma), and ``build_edm``.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364), Table 1.
Shape legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ._bounded import BuiltFor
from .edm_unet import DhariwalUNet, SongUNet


class EDMNetwork(nn.Module):
    """``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)`` (arXiv 2206.00364, equation 7)."""

    sigma_min: float
    sigma_max: float

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, model_type: str = "SongUNet", **model: Any
    ) -> None:
        super().__init__()
        networks: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
        if model_type not in networks:
            raise ValueError(f"model_type is {model_type!r}; it must be one of {', '.join(networks)}")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.model = networks[model_type](img_resolution, img_channels, img_channels, label_dim=label_dim, **model)
        self.label_dropout = float(model.get("label_dropout", 0.0))  # above 0 it knows samples of no class

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (c_skip, c_out, c_in, c_noise), each of sigma's shape, in float64."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], sigma scalar or [B], labels one-hot [B, label_dim] -> denoised x, in the dtype of x."""
        # Scalars stay in float64 until they meet the image: a float32 log(sigma) already moves a learned time.
        level = torch.as_tensor(sigma, device=x.device).to(torch.float64).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = (c.to(x.dtype) for c in self.coefficients(level))
        if self.label_dim == 0:
            labels = None
        elif labels is None:
            labels = torch.zeros(1, self.label_dim, device=x.device, dtype=x.dtype)
        else:
            labels = labels.to(x.dtype).reshape(-1, self.label_dim)
        if augment_labels is not None:
            augment_labels = augment_labels.to(x.dtype)
        return c_skip * x + c_out * self.model(c_in * x, c_noise.flatten(), labels, augment_labels)


class EDMPrecond(EDMNetwork):
    """EDM preconditioning (arXiv 2206.00364, Table 1, "Ours")."""

    def __init__(
        self, *args: Any, sigma_min: float = 0.0, sigma_max: float = math.inf, sigma_data: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(*args, **{"model_type": "DhariwalUNet", **kwargs})
        self.sigma_min, self.sigma_max, self.sigma_data = float(sigma_min), float(sigma_max), sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = sigma.square() + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt(), total.rsqrt(), sigma.log() / 4


class VPPrecond(EDMNetwork):
    """Variance-preserving preconditioning (arXiv 2206.00364, Table 1, "VP")."""

    def __init__(
        self, *args: Any, beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        self.sigma_min, self.sigma_max = self._sigma(epsilon_t), self._sigma(1.0)

    def _sigma(self, t: float) -> float:
        return math.sqrt(math.expm1(self.beta_d * t * t / 2 + self.beta_min * t))

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        growth = 2 * self.beta_d * torch.log1p(sigma.square())
        # The root of beta_d t^2 / 2 + beta_min t = log(1 + sigma^2), written so that small sigma keep their digits.
        t = growth / ((self.beta_min**2 + growth).sqrt() + self.beta_min) / self.beta_d
        return torch.ones_like(sigma), -sigma, (sigma.square() + 1).rsqrt(), (self.M - 1) * t


class VEPrecond(EDMNetwork):
    """Variance-exploding preconditioning (arXiv 2206.00364, Table 1, "VE")."""

    def __init__(self, *args: Any, sigma_min: float = 0.02, sigma_max: float = 100.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(sigma)
        return one, sigma, one, (sigma / 2).log()


def build_edm(
    kwargs: Mapping[str, Any], state_dict: Mapping[str, Any] | None = None, precond: str = "EDMPrecond"
) -> EDMNetwork:
    """Build an EDM network from its published constructor arguments, frozen and in eval mode.

    ``state_dict`` holds tensors or NumPy arrays under the published names; without it the weights are random.
    The network follows the dtype of its input. Call ``requires_grad_(True).train()`` to train it.

    Raises ValueError for an unknown preconditioning or argument and for tensors that are missing, left over
    or of another shape.

        network = build_edm({"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet"})
        denoised = network(x, sigma)
    """
    classes: dict[str, type[EDMNetwork]] = {"EDMPrecond": EDMPrecond, "VPPrecond": VPPrecond, "VEPrecond": VEPrecond}
    if precond not in classes:
        raise ValueError(f"precond is {precond!r}; it must be one of {', '.join(classes)}")
    options = {name: value for name, value in kwargs.items() if name != "use_fp16"}
    tensors = None if state_dict is None else {name: torch.as_tensor(value) for name, value in state_dict.items()}
    try:
        with nullcontext() if tensors is None else BuiltFor(tensors.values()):
            network = classes[precond](**options)
    except TypeError as error:
        known = sorted(set(inspect.signature(SongUNet).parameters) | set(inspect.signature(DhariwalUNet).parameters))
        raise ValueError(f"the network does not take these arguments ({error}); known: {', '.join(known)}") from None
    if tensors is not None:
        try:
            network.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit this network: {' '.join(str(error).split())}") from None
    return network.requires_grad_(False).eval()
