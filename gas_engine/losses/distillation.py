"""Distances between a student's and its teacher's samples.

Shape legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES = ("l1", "l2", "lpips")


def distillation_loss(name: str, device: torch.device | None = None) -> Loss:
    """Return ``loss(student, teacher)``: x, y [B, C, H, W] -> one value per sample, [B].

    "l1": mean |x - y|; "l2": mean (x - y)^2; "lpips": LPIPS-VGG (arXiv 1801.03924) of images in [-1, 1], both resized
    to 224 x 224 (bilinear, align_corners False) and clipped (arXiv 2510.17699, section 4). Raises ValueError for
    another name, or when LPIPS cannot be set up, saying why.

        loss = distillation_loss("l1")(student, teacher).mean()
    """
    if name == "l1":
        return lambda x, y: (x - y).abs().flatten(1).mean(1)
    if name == "l2":
        return lambda x, y: (x - y).square().flatten(1).mean(1)
    if name == "lpips":
        return _lpips(device or torch.device("cpu"))
    raise ValueError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}")


def _lpips(device: torch.device) -> Loss:
    try:
        import torchvision  # noqa: F401  (lpips imports it; asked for here to tell the two failures apart)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"--loss lpips needs a torchvision that fits torch {torch.__version__} ({_first_line(error)}); "
            "install the two together with `pip install -U torch torchvision`, or use --loss l1"
        ) from None
    try:
        import lpips
    except ImportError:
        raise ValueError("--loss lpips needs the lpips package: `pip install lpips`, or use --loss l1") from None
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = lpips.LPIPS(net="vgg", verbose=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            "--loss lpips needs the VGG-16 weights of torchvision, which are neither in the cache "
            f"({torch.hub.get_dir()}/checkpoints) nor downloadable ({_first_line(error)}); put vgg16-397923af.pth "
            "there, or use --loss l1"
        ) from None
    network = network.to(device).eval().requires_grad_(False)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"LPIPS compares grey or RGB images, got {tuple(x.shape)}; use --loss l1")
        return network(_prepared(x), _prepared(y)).flatten()

    return loss


def _prepared(x: Tensor) -> Tensor:
    x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False).clamp(-1, 1)
    return x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
