"""LPIPS (arXiv 1801.03924) of the lpips package's networks, in a graph that keeps little.

Shape legend: b samples, c channels of one layer, h w its height and width.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..memory import lean
from ._measure import Made, Measure

# What a loss is called -> the lpips package's name, torchvision's name of the weights and of their file.
NETWORKS = {
    "lpips": ("vgg", "VGG-16", "vgg16-397923af.pth"),
    "lpips-alex": ("alex", "AlexNet", "alexnet-owt-7be5be79.pth"),
    "lpips-squeeze": ("squeeze", "SqueezeNet 1.1", "squeezenet1_1-b8a52dc0.pth"),
}
_EPSILON = 1e-10  # of lpips.normalize_tensor


class Perceptual(Measure):
    """Sum over layers of ``mean_hw sum_c w_c (n(x) - n(y))^2``, n: features of unit length (arXiv 1801.03924, eq. 1).

    Images [b, 1 or 3, H, W] in [-1, 1] are first resized to 224 x 224 (bilinear, align_corners False) and clipped
    (arXiv 2510.17699, section 4). ``made``: n(y), 23.3 MiB a sample for VGG. Values as the lpips package's to float32
    rounding; where all features of a pixel are zero, the gradient is zero and not NaN. Its graph keeps a bit for every
    ReLU and, for each layer, d value / d features. ``trained=False``: random weights, to measure bytes with.
    Raises ValueError for what are no images, or where torchvision, lpips or weights are missing, saying which.
    """

    def __init__(self, name: str, device: torch.device, trained: bool = True) -> None:
        network: Any = _load(name, trained).to(device).eval().requires_grad_(False)
        self.weight_bytes = sum(p.nbytes for p in network.parameters())
        self.scale, self.trunk = network.scaling_layer, lean(network.net)
        self.weights = [layer.model[-1].weight.flatten() for layer in network.lins]
        self.makes = len(self.weights)

    def made(self, y: Tensor) -> Made:
        return tuple(_normalised(f)[0] for f in self._features(y))

    def of(self, x: Tensor, y: Tensor, made: Made) -> Tensor:
        layers = zip(self._features(x), made, self.weights, strict=True)
        return torch.stack([_Layer.apply(*layer) for layer in layers]).sum(0)

    def _features(self, x: Tensor) -> Any:
        return self.trunk(self.scale(_prepared(x)))


class _Layer(torch.autograd.Function):
    """One layer's distance [b] of features f [b, c, h, w] from the teacher's normalised ones; keeps its gradient."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, target: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        normalised, length = _normalised(f)
        difference = normalised - target
        pull = difference * (weights.to(f.dtype).view(1, -1, 1, 1) * (2 / f[0, 0].numel()))
        value = (difference.mul_(pull)).flatten(1).sum(1) / 2
        if ctx.needs_input_grad[0]:
            # n = f / (r + e), r = |f|: dn/df = 1 / (r + e) - n n^T / r
            along = (normalised * pull).sum(1, keepdim=True) / length.clamp(min=_EPSILON)
            ctx.save_for_backward(pull.div_(length + _EPSILON).sub_(normalised.mul_(along)))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * g.view(-1, 1, 1, 1), None, None


def _normalised(f: Tensor) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    return f / (length + _EPSILON), length


def _prepared(x: Tensor) -> Tensor:
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"LPIPS compares grey or RGB images, got {tuple(x.shape)}; use --loss l1")
    x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False).clamp(-1, 1)
    return x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)


def _load(name: str, trained: bool) -> nn.Module:
    try:
        import torchvision  # noqa: F401  (lpips imports it; asked for here to tell the two failures apart)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"--loss {name} needs a torchvision that fits torch {torch.__version__} ({_first_line(error)}); "
            "install the two together with `pip install -U torch torchvision`, or use --loss l1"
        ) from None
    try:
        import lpips
    except ImportError:
        raise ValueError(f"--loss {name} needs the lpips package: `pip install lpips`, or use --loss l1") from None
    kind, weights, file = NETWORKS[name]
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lpips.LPIPS(net=kind, pretrained=trained, pnet_rand=not trained, verbose=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"--loss {name} needs the {weights} weights of torchvision, which are neither in the cache "
            f"({torch.hub.get_dir()}/checkpoints) nor downloadable ({_first_line(error)}); put {file} "
            "there, or use --loss l1"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
