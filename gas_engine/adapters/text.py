"""What a diffusers pipeline's denoiser is told: prompts, classes by name, sizes, the scale of guidance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Generator, Tensor

from ..conditioning import Classes, Conditioning, Range, scales
from ..prompts import read_prompts
from .text_encoders import CHUNK, Row, TextEncoders, directory_of

__all__ = ["NamedClasses", "Prompts", "TextConditioning", "conditioning_of"]

DISTILLED_GUIDANCE = 3.5  # what the pipelines of models that take guidance as an input are called with by default


def conditioning_of(
    location: str,
    resolution: int | tuple[int, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    length: int | None = None,
) -> Conditioning | None:
    """What the denoiser of a saved pipeline (a directory or a Hub id) is told; no weights are read.

    A text model has a ``TextConditioning``, to be told its prompts; one of classes ``NamedClasses``; others None.
    ``resolution``: pixels [height, width] of the images, the model's own unless given. ``dtype``, ``device`` and
    ``length`` (tokens): see ``TextEncoders``.

        denoiser.conditioning = conditioning_of("stable-diffusion-v1-5").told("captions_val2014.json", "", None)
    """
    directory = directory_of(location)
    index = _json(directory / "model_index.json")
    name = next((n for n in ("unet", "transformer") if isinstance(index.get(n), list) and index[n][0]), "")
    config = _json(directory / name / "config.json") if name else {}
    if any(key.startswith("text_encoder") and isinstance(value, list) and value[0] for key, value in index.items()):
        given = (resolution, resolution) if isinstance(resolution, int) else resolution
        encoders = TextEncoders(directory, dtype, device, length)
        sizes = _sizes(config, given or _own_size(config, directory))
        return TextConditioning(location, encoders, sizes, bool(config.get("guidance_embeds")))
    classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    return NamedClasses(int(classes), index.get("id2label") or {}) if classes else None


def _own_size(config: dict[str, Any], directory: Path) -> tuple[int, int]:
    side = config.get("sample_size") or 128
    height, width = (side, side) if isinstance(side, int) else side
    vae = directory / "vae" / "config.json"
    factor = 2 ** (len(_json(vae).get("block_out_channels", [0])) - 1) if vae.exists() else 8
    return int(height * factor), int(width * factor)


def _sizes(config: dict[str, Any], size: tuple[int, int]) -> Row:
    """What a model is told of the image's size, [1, ...]: SDXL (arXiv 2307.01952) the original size, the crop's corner
    and the target size; PixArt at 1024 pixels the resolution and the aspect ratio."""
    height, width = size
    if config.get("addition_embed_type") == "text_time":
        return {"time_ids": torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)}
    told = config.get("use_additional_conditions")
    if config.get("_class_name") == "PixArtTransformer2DModel" and (
        config["sample_size"] == 128 if told is None else told
    ):
        return {"resolution": torch.tensor([[height, width]]).float(), "aspect_ratio": torch.tensor([[height / width]])}
    return {}


class TextConditioning(Conditioning):
    """A text model that was not told its prompts yet; ``told`` encodes them.

    ``guidance_input``: the model takes the scale of guidance as an input, in place of a second call.
    """

    takes_prompts = True

    def __init__(self, name: str, encoders: TextEncoders, sizes: Row, guidance_input: bool = False) -> None:
        self.name, self.encoders, self.sizes, self.guidance_input = name, encoders, sizes, guidance_input

    def told(self, prompts: str | None, negative: str = "", guidance: float | Range | None = None) -> Prompts:
        """The conditioning of a file of prompts, or of the prompt itself; ``guidance`` for a model that takes it.

        Encodes what is not cached. Raises ValueError without prompts, and for a negative prompt that a model of
        distilled guidance has no use for.
        """
        if prompts is None:
            raise ValueError(f"{self.name} is told by text; say by which: --prompts FILE or TEXT")
        if negative and self.guidance_input:
            raise ValueError(f"{self.name} takes guidance as an input, and no negative prompt; leave it out")
        texts = read_prompts(prompts)
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
        return Prompts(texts, files, self.sizes, null, scale, facts)

    def draw(self, seeds: Sequence[int], generators: Sequence[Generator]) -> Any:
        return self.told(None)


class Prompts(Conditioning):
    """The embeddings of prompt ``seed % N``, read from their files when they are drawn.

    Conditions, float32: "text" [B, L, E], with "pooled" [B, P], "mask" [B, L], "time_ids" [B, 6] and "guidance" [B]
    where the model takes them. Nothing of them stays in memory. ``null``: the negative prompt's, [1, ...].
    """

    def __init__(
        self, texts: list[str], files: list[Path], sizes: Row, null: Row | None, scale: float | Range | None,
        facts: dict[str, Any],
    ) -> None:  # fmt: skip
        self.texts, self.files, self.sizes, self.scale = texts, files, sizes, scale
        self.null = None if null is None else {**_wide(null), **sizes}
        self.guidance_input = scale is not None
        self._facts = facts

    def draw(self, seeds: Sequence[int], generators: Sequence[Generator]) -> Row:
        rows = [self._row(seed % len(self.texts)) for seed in seeds]
        cond = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        cond |= {name: value.repeat(len(rows), 1) for name, value in self.sizes.items()}
        if self.scale is not None:
            cond["guidance"] = scales(self.scale, generators)
        return cond

    def _row(self, n: int) -> Row:
        with safe_open(self.files[n // CHUNK], framework="pt") as file:
            row = {name: file.get_slice(name)[n % CHUNK : n % CHUNK + 1] for name in file.keys()}  # noqa: SIM118
        return _wide(row)

    def facts(self) -> dict[str, Any]:
        return self._facts


class NamedClasses(Classes):
    """A class drawn for each seed, of all, or of those that prompts name: "goldfish", or their numbers.

    The null class is the one behind the last (arXiv 2212.09748).
    """

    takes_prompts = True

    def __init__(self, count: int, names: dict[str, str], only: list[int] | None = None) -> None:
        super().__init__(count, null=count)
        self.names, self.only = names, only

    def told(self, prompts: str | None, negative: str = "", guidance: float | Range | None = None) -> NamedClasses:
        if negative:
            raise ValueError("a model of classes takes no negative prompt; leave it out")
        if prompts is None:
            return self
        numbers = {part.strip().lower(): int(n) for n, name in self.names.items() for part in [name, *name.split(",")]}
        numbers |= {str(n): n for n in range(self.classes or 0)}
        only = []
        for name in read_prompts(prompts):
            if name.lower() not in numbers:
                few = ", ".join(list(numbers)[:3])
                raise ValueError(f"{name!r} is no class of this model; it has {few} and so on")
            only.append(numbers[name.lower()])
        return NamedClasses(self.classes or 0, self.names, only)

    def draw(self, seeds: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        if self.only is None:
            return super().draw(seeds, generators)
        return torch.tensor([self.only[seed % len(self.only)] for seed in seeds])

    def facts(self) -> dict[str, Any]:
        return {} if self.only is None else {"classes": self.only}


def _wide(row: Row) -> Row:
    return {name: value.float() if value.is_floating_point() else value for name, value in row.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, no object")
    return value
