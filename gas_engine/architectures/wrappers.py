"""Networks of diffusers as a denoiser's function: ``(x, t, cond) -> F``, differentiable in x and t.

Each is a module that owns its network as a child, so that a view of the whole denoiser (lean, with block checkpoints)
reaches it. The schedule's t becomes the network's label in float64, with its fraction; states and conditions take the
network's own dtype on the way in. Shape legend: B batch, C channels, H W height and width, L tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..schedule import Schedule

LABELS = 1000  # the number of training times that every one of these networks counts in


class DiffusersFunction(nn.Module):
    """A network of diffusers, from its constructor's arguments, with random frozen weights.

    ``conditions`` are the shapes, without the batch, of the conditioning tensors; None is a class index. Raises
    ValueError if diffusers is missing.
    """

    network_class: ClassVar[str]
    network: Any

    def __init__(self, arguments: Mapping[str, Any], schedule: Schedule) -> None:
        super().__init__()
        self.network = diffusers_class(self.network_class)(**arguments).eval().requires_grad_(False)
        self.schedule = schedule

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]] | None:
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        dtype = self.network.dtype
        cond = tree_map(lambda c: c.to(dtype) if isinstance(c, Tensor) and c.is_floating_point() else c, cond)
        return self.call(x.to(dtype), network_label(self.schedule, t).expand(len(x)), cond)

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        """x in the network's dtype, label [B] in float64."""
        raise NotImplementedError


class TextUNet(DiffusersFunction):
    """Stable Diffusion 1 and 2 and their like; cond: text [B, L, E]."""

    network_class = "UNet2DConditionModel"

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]] | None:
        return {"text": (tokens, arguments["cross_attention_dim"])}

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        return self.network(x, label, cond["text"], return_dict=False)[0]


class TextSizeUNet(TextUNet):
    """Stable Diffusion XL; cond: text [B, L, E], pooled [B, P], time_ids [B, 6] (sizes and crops, in pixels)."""

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]] | None:
        sizes = 6
        pooled = arguments["projection_class_embeddings_input_dim"] - sizes * arguments["addition_time_embed_dim"]
        return {"text": (tokens, arguments["cross_attention_dim"]), "pooled": (pooled,), "time_ids": (sizes,)}

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        return self.network(x, label, cond["text"], added_cond_kwargs=added, return_dict=False)[0]


class UNet(DiffusersFunction):
    """LDM's unconditional U-Net; cond: None."""

    network_class = "UNet2DModel"

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> None:
        return None

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        return self.network(x, label, return_dict=False)[0]


class ClassUNet(DiffusersFunction):
    """LDM's class-conditional U-Net, which reads the class as one token of context; cond: class indices [B].

    ``rows`` of the embedding: of the 1000 classes of ImageNet, and of the null class of guidance after them.
    """

    network_class = "UNet2DConditionModel"

    def __init__(self, arguments: Mapping[str, Any], schedule: Schedule, rows: int = 1001) -> None:
        super().__init__(arguments, schedule)
        self.embedding = nn.Embedding(rows, arguments["cross_attention_dim"]).requires_grad_(False)

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> None:
        return None

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        return self.network(x, label, self.embedding(cond)[:, None], return_dict=False)[0]


class ClassTransformer(DiffusersFunction):
    """DiT; cond: class indices [B]; the index after the last class is the null class of guidance.

    The network also predicts a variance, which an ODE has no use for. The published network has one embedding of
    times and classes; diffusers gives each block a copy.
    """

    network_class = "DiTTransformer2DModel"

    def __init__(self, arguments: Mapping[str, Any], schedule: Schedule) -> None:
        super().__init__(arguments, schedule)
        first, *others = self.network.transformer_blocks
        for block in others:
            block.norm1.emb = first.norm1.emb

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> None:
        return None

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        return self.network(x, label, cond, return_dict=False)[0][:, : x.shape[1]]


class TextTransformer(DiffusersFunction):
    """Stable Diffusion 3; cond: text [B, L, E], pooled [B, P]."""

    network_class = "SD3Transformer2DModel"

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]] | None:
        return {
            "text": (tokens, arguments["joint_attention_dim"]),
            "pooled": (arguments["pooled_projection_dim"],),
        }

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        return self.network(x, cond["text"], cond["pooled"], label, return_dict=False)[0]


class PackedTransformer(DiffusersFunction):
    """FLUX.1, which sees patches of 2 x 2 pixels as tokens; cond: text [B, L, E], pooled [B, P], guidance [B].

    States stay pictures, [B, C, H, W] with even H and W.
    """

    network_class = "FluxTransformer2DModel"

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]] | None:
        shapes: dict[str, tuple[int, ...]] = {
            "text": (tokens, arguments["joint_attention_dim"]),
            "pooled": (arguments["pooled_projection_dim"],),
        }
        return shapes | ({"guidance": ()} if arguments.get("guidance_embeds") else {})

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        # [B, C, H, W] -> [B, H/2 W/2, 4 C]: one token for each patch, channels first within it.
        packed = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        places = torch.zeros(rows, columns, 3, device=x.device)
        places[..., 1] += torch.arange(rows, device=x.device)[:, None]
        places[..., 2] += torch.arange(columns, device=x.device)
        output = self.network(
            packed, cond["text"], cond["pooled"], label / LABELS, places.flatten(0, 1),
            torch.zeros(cond["text"].shape[1], 3, device=x.device), cond.get("guidance"), return_dict=False,
        )[0]  # fmt: skip
        patches = output.unflatten(2, (x.shape[1], 2, 2)).unflatten(1, (rows, columns))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def network_label(schedule: Schedule, t: Tensor) -> Tensor:
    """The label of time t: ``1000 (t - 1/N)`` for N discrete training times, ``1000 sigma(t)`` for a flow."""
    if schedule.kind == "flow":
        return LABELS * schedule.sigma(t)
    return LABELS * (t - 1 / len(schedule.parameters["alphas_cumprod"]))


def diffusers_class(name: str) -> type[nn.Module]:
    """A class of diffusers. Raises ValueError if it is not installed."""
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what its optional dependencies say of each other
    try:
        import diffusers

        return getattr(diffusers, name)
    except ImportError:
        raise ValueError(f"{name} comes from diffusers, which is not installed: `pip install diffusers`") from None
    finally:
        logging.disable(quiet)
