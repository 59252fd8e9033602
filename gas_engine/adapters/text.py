"""What a diffusers pipeline's denoiser is told: prompts, classes by name, sizes, the scale of guidance."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Generator, Tensor

from ..conditioning import Classes, Conditioning, Range, scales
from ..denoiser import Denoiser
from ..prompts import read_prompts
from .text_encoders import CHUNK, Row, TextEncoders, directory_of

__all__ = ["NamedClasses", "Prompts", "TextConditioning", "conditioning_of"]

DISTILLED_GUIDANCE = 3.5  # what the pipelines of models that take guidance as an input are called with by default


def conditioning_of(
    denoiser: Denoiser,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    length: int | None = None,
) -> Conditioning | None:
    """What the denoiser of a saved pipeline (of ``load_diffusers``) is told; no weights are read.

    A text model has a ``TextConditioning``, to be told its prompts; one of classes ``NamedClasses``; others what they
    have. ``dtype``, ``device`` and ``length``: see ``TextEncoders``.

        denoiser = load_diffusers("stable-diffusion-v1-5")
        denoiser.conditioning = conditioning_of(denoiser).told("captions_val2014.json", "", None)
    """
    own, directory = denoiser.conditioning, directory_of(denoiser.name)
    if not (directory / "model_index.json").exists():
        return own
    index = json.loads((directory / "model_index.json").read_text())
    if any(name.startswith("text_encoder") and isinstance(v, list) and v[0] for name, v in index.items()):
        if length is not None and not any("T5" in str(v[1:]) for v in index.values() if isinstance(v, list)):
            raise ValueError(
                f"a text length of {length} is of a T5 encoder, and {denoiser.name} has none; leave it out"
            )
        function: Any = denoiser.function
        encoders = TextEncoders(directory, dtype, device, length)
        guided = bool(function.network.config.get("guidance_embeds"))
        return TextConditioning(denoiser.name, encoders, _sizes(function.network, denoiser.shape, directory), guided)
    if isinstance(own, Classes) and own.null is not None:
        return NamedClasses(own, index.get("id2label") or {})
    return own


def _sizes(network: Any, shape: tuple[int, ...] | None, directory: Path) -> Row:
    """What a model is told of an image's size, [1, ...]: SDXL (arXiv 2307.01952) the original size, the crop's corner
    and the target size; PixArt at 1024 pixels the resolution and the aspect ratio."""
    assert shape is not None
    vae = directory / "vae" / "config.json"
    scale = 2 ** (len(json.loads(vae.read_text())["block_out_channels"]) - 1) if vae.exists() else 1
    height, width = (float(scale * side) for side in shape[1:])
    if network.config.get("addition_embed_type") == "text_time":
        return {"time_ids": torch.tensor([[height, width, 0.0, 0.0, height, width]])}
    if getattr(network, "use_additional_conditions", False):
        return {"resolution": torch.tensor([[height, width]]), "aspect_ratio": torch.tensor([[height / width]])}
    return {}


class TextConditioning(Conditioning):
    """A text model that was not told its prompts yet; ``told`` encodes them.

    ``guidance_input``: the model takes the scale of guidance as an input, in place of a second call.
    """

    takes_prompts = True

    def __init__(self, name: str, encoders: TextEncoders, sizes: Row, guidance_input: bool = False) -> None:
        self.name, self.encoders, self.sizes, self.guidance_input = name, encoders, sizes, guidance_input

    def told(
        self, prompts: str | list[str] | None, negative: str = "", guidance: float | Range | None = None
    ) -> Prompts:
        """The conditioning of a file of prompts, of the prompt itself, or of a list of them; ``guidance`` for a model
        that takes it.

        Encodes what is not cached. Raises ValueError without prompts, and for a negative prompt that a model of
        distilled guidance has no use for.
        """
        if prompts is None:
            raise ValueError(f"{self.name} is told by text; say by which: --prompts FILE or TEXT")
        if negative and self.guidance_input:
            raise ValueError(f"{self.name} takes guidance as an input, and no negative prompt; leave it out")
        texts = read_prompts(prompts) if isinstance(prompts, str) else prompts
        try:
            files = self.encoders.encode(texts)
            null = None if self.guidance_input else self.encoders.null(negative)
        finally:
            self.encoders.release()
        scale = (DISTILLED_GUIDANCE if guidance is None else guidance) if self.guidance_input else None
        facts = {
            "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            "count": len(texts),
            "negative": negative,
            "encoders": self.encoders.fingerprint,
            "guidance": list(scale) if isinstance(scale, tuple) else scale,
            "sizes": {name: value[0].tolist() for name, value in self.sizes.items()},
        }
        return Prompts(texts, files, self.sizes, null, scale, facts, self.encoders)

    def draw(self, seeds: Sequence[int], generators: Sequence[Generator]) -> Any:
        return self.told(None)


class Prompts(Conditioning):
    """The embeddings of prompt ``seed % N``, read from their files when they are drawn.

    Conditions, float32: "text" [B, L, E], with "pooled" [B, P], "mask" [B, L], "time_ids" [B, 6] and "guidance" [B]
    where the model takes them. Nothing of them stays in memory. ``null``: the negative prompt's, [1, ...].
    """

    def __init__(
        self, texts: list[str], files: list[Path], sizes: Row, null: Row | None, scale: float | Range | None,
        facts: dict[str, Any], encoders: TextEncoders,
    ) -> None:  # fmt: skip
        self.texts, self.files, self.sizes, self.scale, self.encoders = texts, files, sizes, scale, encoders
        self.null = None if null is None else {**_wide(null), **sizes}
        self.guidance_input = scale is not None
        self._facts = facts

    def draw(self, seeds: Sequence[int], generators: Sequence[Generator]) -> Row:
        rows = [self._row(seed % len(self.texts)) for seed in seeds]
        cond = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        cond |= {name: value.repeat(len(rows), 1) for name, value in self.sizes.items()}
        if self.scale is not None:
            cond["guidance"] = scales(self.scale, seeds)
        return cond

    def of(self, texts: list[str]) -> Prompts:
        try:
            other = copy.copy(self)
            other.texts, other.files = texts, self.encoders.encode(texts)
            return other
        finally:
            self.encoders.release()

    def _row(self, n: int) -> Row:
        with safe_open(self.files[n // CHUNK], framework="pt") as file:
            row = {name: file.get_slice(name)[n % CHUNK : n % CHUNK + 1] for name in file.keys()}  # noqa: SIM118
        return _wide(row)

    def facts(self) -> dict[str, Any]:
        return self._facts


class NamedClasses(Classes):
    """A class drawn for each seed, of all, or of those that prompts name: "goldfish", or their numbers."""

    takes_prompts = True

    def __init__(self, classes: Classes, names: dict[str, str], only: list[int] | None = None) -> None:
        assert classes.classes is not None
        super().__init__(classes.classes)
        self.null, self.names, self.only = classes.null, names, only

    def told(
        self, prompts: str | list[str] | None, negative: str = "", guidance: float | Range | None = None
    ) -> NamedClasses:
        if negative:
            raise ValueError("a model of classes takes no negative prompt; leave it out")
        if prompts is None:
            return self
        numbers = {part.strip().lower(): int(n) for n, name in self.names.items() for part in [name, *name.split(",")]}
        numbers |= {str(n): n for n in range(self.classes or 0)}
        only = []
        for name in read_prompts(prompts) if isinstance(prompts, str) else prompts:
            if name.lower() not in numbers:
                few = "; ".join([*list(self.names.values())[:2], f"0 to {(self.classes or 1) - 1}"])
                raise ValueError(f"{name!r} is no class of this model; it has {few}")
            only.append(numbers[name.lower()])
        return NamedClasses(self, self.names, only)

    def draw(self, seeds: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        if self.only is None:
            return super().draw(seeds, generators)
        return torch.tensor([self.only[seed % len(self.only)] for seed in seeds])

    def facts(self) -> dict[str, Any]:
        return {} if self.only is None else {"classes": self.only}


def _wide(row: Row) -> Row:
    return {name: value.float() if value.is_floating_point() else value for name, value in row.items()}
