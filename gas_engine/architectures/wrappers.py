"""Networks of diffusers as a denoiser's function: ``(x, t, cond) -> F``, differentiable in x and t.

Each is a module that owns its network as a child, so that a view of the whole denoiser (lean, with block checkpoints)
reaches it. The schedule's t becomes the network's label in float64, with its fraction, and stays so until sines are
made of it: in bfloat16 labels near 900 lie 4 apart. States and conditions take the network's
own dtype on the way in. Shape legend: B batch, C channels, H W height and width, L tokens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..schedule import Schedule

LABELS = 1000  # the number of training times that the published networks count in


class DiffusersFunction(nn.Module):
    """A network of diffusers, frozen: one that is there, or, from its constructor's arguments, one of random weights.

    ``labels``: what a flow's network is told at its noisiest time; discrete schedules count their own. ``conditions``
    are the shapes, without the batch, of the conditioning tensors; None is a class index. Channels that the network
    returns beside those of x are a learned variance, which an ODE has no use for. Raises ValueError if diffusers is
    missing.
    """

    network_class: ClassVar[str]
    network: Any

    def __init__(self, network: nn.Module | Mapping[str, Any], schedule: Schedule, labels: float = LABELS) -> None:
        super().__init__()
        built = diffusers_class(self.network_class)(**network) if isinstance(network, Mapping) else network
        self.network = built.eval().requires_grad_(False)
        self.schedule, self.labels = schedule, labels

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]] | None:
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        dtype = self.network.dtype
        label = network_label(self.schedule, t, self.labels).expand(len(x))
        output = self.call(x.to(dtype), label, tree_map(lambda c: _of_batch(c, len(x), dtype), cond))
        return output if output.shape[1] == x.shape[1] else output[:, : x.shape[1]]

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
    """The U-Net of DDPM (arXiv 2006.11239) and of unconditional LDM; cond: None, or class indices [B]."""

    network_class = "UNet2DModel"

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> None:
        return None

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        return self.network(x, label, cond, return_dict=False)[0]


class ClassUNet(DiffusersFunction):
    """LDM's class-conditional U-Net, which reads the class as one token of context; cond: class indices [B].

    ``rows`` of the embedding: of the 1000 classes of ImageNet, and of the null class of guidance after them.
    """

    network_class = "UNet2DConditionModel"

    def __init__(
        self, network: nn.Module | Mapping[str, Any], schedule: Schedule, labels: float = LABELS, rows: int = 1001
    ) -> None:
        super().__init__(network, schedule, labels)
        self.embedding = nn.Embedding(rows, self.network.config.cross_attention_dim).requires_grad_(False)

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> None:
        return None

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        return self.network(x, label, self.embedding(cond)[:, None], return_dict=False)[0]


class ClassTransformer(DiffusersFunction):
    """DiT; cond: class indices [B]; the index after the last class is the null class of guidance.

    The published network has one embedding of times and classes; diffusers gives each block a copy, and where the
    copies are equal one of them serves all blocks.
    """

    network_class = "DiTTransformer2DModel"

    def __init__(self, network: nn.Module | Mapping[str, Any], schedule: Schedule, labels: float = LABELS) -> None:
        super().__init__(network, schedule, labels)
        first, *others = (block.norm1 for block in self.network.transformer_blocks)
        for norm in others:
            if isinstance(network, Mapping) or _equal(norm.emb, first.emb):
                norm.emb = first.emb

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> None:
        return None

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        return self.network(x, label, cond, return_dict=False)[0]


class MaskedTextTransformer(DiffusersFunction):
    """PixArt; cond: text [B, L, E], mask [B, L] (1 where there is text), and, for the networks that are told sizes,
    resolution [B, 2] (height and width in pixels) and aspect_ratio [B, 1]."""

    network_class = "PixArtTransformer2DModel"

    @staticmethod
    def conditions(arguments: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]] | None:
        return {"text": (tokens, arguments["caption_channels"]), "mask": (tokens,)}

    def call(self, x: Tensor, label: Tensor, cond: Any) -> Tensor:
        added = {name: cond.get(name) for name in ("resolution", "aspect_ratio")}
        return self.network(
            x, cond["text"], label, added_cond_kwargs=added, encoder_attention_mask=cond.get("mask"), return_dict=False
        )[0]


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

    States stay pictures, [B, C, H, W] with even H and W. The network multiplies its label and its guidance by 1000 in
    its own precision, so they are handed past it to the module that embeds them.
    """

    network_class = "FluxTransformer2DModel"

    def __init__(self, network: nn.Module | Mapping[str, Any], schedule: Schedule, labels: float = LABELS) -> None:
        super().__init__(network, schedule, labels)
        self.told = _Told()
        self.network.time_text_embed.register_forward_pre_hook(self.told)

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
        guidance = cond.get("guidance")
        with self.told.saying(label, *([] if guidance is None else [LABELS * guidance])):
            output = self.network(
                packed, cond["text"], cond["pooled"], label / LABELS, places.flatten(0, 1),
                torch.zeros(cond["text"].shape[1], 3, device=x.device), guidance, return_dict=False,
            )[0]  # fmt: skip
        patches = output.unflatten(2, (x.shape[1], 2, 2)).unflatten(1, (rows, columns))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class _Told:
    """What a module is told in place of its first arguments, while the network around it runs."""

    def __init__(self) -> None:
        self.arguments: tuple[Tensor, ...] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*self.arguments, *args[len(self.arguments) :])

    @contextlib.contextmanager
    def saying(self, *arguments: Tensor) -> Iterator[None]:
        self.arguments = arguments
        try:
            yield
        finally:
            self.arguments = ()


def network_label(schedule: Schedule, t: Tensor, labels: float = LABELS) -> Tensor:
    """The label of time t: ``N (t - 1/N)`` for N discrete training times, ``labels sigma(t)`` for a flow."""
    if schedule.kind == "flow":
        return labels * schedule.sigma(t)
    count = len(schedule.parameters["alphas_cumprod"])
    return count * (t - 1 / count)


def diffusers_class(name: str) -> Any:
    """A class of diffusers by its name. Raises ValueError if there is none, or no diffusers."""
    with quiet():
        try:
            import diffusers

            return getattr(diffusers, name)
        except ImportError:
            raise ValueError(f"{name} comes from diffusers, which is not installed: `pip install diffusers`") from None
        except AttributeError:
            raise ValueError(
                f"the installed diffusers {diffusers.__version__} has no {name}; a newer one may"
            ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries log of each other."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what they raise says it as well
    try:
        yield
    finally:
        logging.disable(level)


def _of_batch(value: Any, batch: int, dtype: torch.dtype) -> Any:
    """A condition for every sample, in the network's dtype; one number a sample keeps its digits."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
    return value.expand(batch, *value.shape[1:]) if len(value) == 1 else value


def _equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
