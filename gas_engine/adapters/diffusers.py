"""Pipelines of diffusers, from a directory that ``save_pretrained`` wrote or from the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..architectures.wrappers import diffusers_class, quiet
from ..denoiser import Denoiser
from ..losses.decoders import VAE
from ._diffusers_networks import classes_of, function_of, shape_of, tokens_of
from ._diffusers_schedulers import read_process

DENOISERS = ("unet", "transformer")
AUTOENCODERS = ("vae", "vqvae")


def load_diffusers(name: str, *, resolution: int | None = None, dtype: torch.dtype | None = None) -> Denoiser:
    """The denoiser of a pipeline, frozen, on the CPU, without conditioning of text.

    ``name``: a directory of a pipeline, a directory of its network with a scheduler_config.json beside it or in
    ../scheduler, or a Hub id. ``resolution``: pixels a side, the model's own unless given. ``dtype``: of the weights,
    float32 unless given. Schedule, prediction type and shift are those of the scheduler. Conditions: class indices
    (DiT), {"text"} (SD 1 and 2), {"text", "pooled", "time_ids"} (SDXL), {"text", "pooled"} (SD 3),
    {"text", "pooled", "guidance"} (FLUX), {"text", "mask"} (PixArt), and by the names of its forward for any other.
    ``decoder`` reads the autoencoder's weights, in float32, when it is first used. Only safetensors are read.
    Raises ValueError for what cannot be read or served, in one sentence.

        denoiser = load_diffusers("stable-diffusion-v1-5")
        F = denoiser(x, torch.tensor(0.5), {"text": text})
    """
    source = _Source.of(name)
    network = source.network(dtype)
    scale, decoder = source.autoencoder()
    shape = shape_of(network, scale, resolution)
    schedule, prediction, labels = read_process(source.config("scheduler"), tokens_of(network, shape))
    return Denoiser(
        function_of(network, schedule, labels), schedule, prediction, shape, conditioning=classes_of(network),
        decoder=decoder, name=name,
    )  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """Where the parts of a pipeline are."""

    name: str
    components: Mapping[str, tuple[str, str]]
    alone: bool = False  # a network's own directory

    @classmethod
    def of(cls, name: str) -> _Source:
        path = Path(name)
        if path.is_dir() and not (path / "model_index.json").exists():
            if not (path / "config.json").exists():
                raise ValueError(
                    f"{name} has neither model_index.json nor config.json; give a directory that save_pretrained wrote"
                )
            config = _settings(diffusers_class("AutoencoderKL").load_config, name, "config.json of")
            found = {"transformer": ("diffusers", str(config.get("_class_name")))}
            return cls(name, found, alone=True)
        index = _settings(diffusers_class("DiffusionPipeline").load_config, name, "model_index.json of")
        components = {
            key: (value[0], value[1])
            for key, value in index.items()
            if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, str) for v in value)
        }
        return cls(name, components)

    def network(self, dtype: torch.dtype | None) -> Any:
        """The denoiser's network, frozen."""
        found = [key for key in self.components if key.startswith(DENOISERS)]
        if len(found) != 1:
            said = f"has {' and '.join(found)}" if found else f"has none of {', '.join(DENOISERS)}"
            raise ValueError(f"{self.name} {said}; a model of exactly one denoiser is served")
        other = next((key for key in self.components if "controlnet" in key or "adapter" in key), None)
        if other is not None:
            raise ValueError(f"{self.name} has {other!r}, which its denoiser waits for; give the pipeline without it")
        return self._model(found[0], dtype)

    def autoencoder(self) -> tuple[int, Callable[[Tensor], Tensor] | None]:
        """Pixels per latent, and what makes pixels of latents; 1 and None where states are pictures."""
        key = next((key for key in AUTOENCODERS if key in self.components), None)
        if key is None and not (self.alone and (Path(self.name).parent / "vae").is_dir()):
            return 1, None
        key = key or "vae"
        config = self.config(key)
        levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        if not levels:
            raise ValueError(f"the {key} of {self.name} ({config.get('_class_name')}) does not say its levels")
        return 2 ** (len(levels) - 1), LazyVAE(lambda: self._model(key, torch.float32, str(config.get("_class_name"))))

    def config(self, part: str) -> dict[str, Any]:
        """Of a component, as it is saved."""
        where, subfolder = self._where(part)
        load = diffusers_class("DDIMScheduler" if part == "scheduler" else "AutoencoderKL").load_config
        return _settings(lambda place: load(place, subfolder=subfolder), where, f"the {part}'s configuration of")

    def _where(self, part: str) -> tuple[str, str | None]:
        if not self.alone:
            return self.name, part
        if part == "scheduler" and not (Path(self.name) / "scheduler_config.json").exists():
            return str(Path(self.name).parent), part
        return (self.name, None) if part in ("scheduler", "transformer") else (str(Path(self.name).parent), part)

    def _model(self, part: str, dtype: torch.dtype | None, kind: str | None = None) -> Any:
        library, name = self.components.get(part, ("diffusers", kind or ""))
        if library != "diffusers":
            raise ValueError(
                f"the {part} of {self.name} is {name} of {library!r}, code that is not run; it must be one of diffusers"
            )
        cls: Any = diffusers_class(name)
        is_network = isinstance(cls, type) and issubclass(cls, nn.Module)
        if not is_network:
            raise ValueError(f"the {part} of {self.name} is {name}, which is no network")
        where, subfolder = self._where(part)

        def load(place: str) -> Any:
            return cls.from_pretrained(
                place, subfolder=subfolder, use_safetensors=True, torch_dtype=dtype or torch.float32,
                output_loading_info=True,
            )  # fmt: skip

        try:
            model, info = _read(load, where, f"the {part} of")
        except ValueError:
            folder = Path(where) / (subfolder or "")
            if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
                raise ValueError(
                    f"the {part} of {self.name} is a pickle (.bin), and only safetensors are read: save it again with "
                    f"diffusers.{name}.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
                ) from None
            raise
        lost = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
        if lost:
            raise ValueError(f"the {part} of {self.name} lacks {len(lost)} of its tensors, {lost[0]!r} among them")
        return model


class LazyVAE(VAE):
    """Latents [B, C, h, w] -> pictures; the weights are read, in float32, when it is first called or looked into."""

    def __init__(self, read: Callable[[], Any]) -> None:
        nn.Module.__init__(self)
        self._unread: Callable[[], Any] | None = read

    def read(self) -> None:
        """Read the weights, if they are not there. Raises ValueError where they cannot be."""
        if self._unread is not None:
            vae = self._unread()
            if vae.config.get("latents_mean") is not None:
                raise ValueError(f"{type(vae).__name__} has latents_mean: latents of another scale, not served")
            self._unread, self.vae = None, vae.requires_grad_(False).eval()

    def forward(self, z: Tensor) -> Tensor:
        self.read()
        return super().forward(z.float())

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self.read()
        return super().named_modules(*args, **kwargs)

    def named_children(self) -> Any:
        self.read()
        return super().named_children()


def _settings(load: Callable[[str], Any], name: str, what: str) -> dict[str, Any]:
    found = _read(load, name, what)
    if not isinstance(found, dict):
        raise ValueError(f"cannot read {what} {name}: it is a {type(found).__name__}, not an object of settings")
    return found


def _read(load: Callable[[str], Any], name: str, what: str) -> Any:
    try:
        with quiet():
            return load(name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        said = " ".join(lines[: 1 + lines[0].endswith(":")])
        if not Path(name).exists():
            said = f"there is no such directory, and the Hub did not give it (offline, private, or no such id): {said}"
        raise ValueError(f"cannot read {what} {name}: {said}") from None
