"""Published R3GAN discriminators (arXiv 2501.05441) from the pickles they come in, or converted to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .._safe_pickle import bounded, mapping_of, read_pickle, said, state_dict_of
from ..networks import R3GANDiscriminator
from .described import is_safetensors, read_described

FORMAT = "gas_engine.r3gan/1"


def load_r3gan(path: Path | str) -> R3GANDiscriminator:
    """The discriminator `D` of an R3GAN snapshot, trainable, its conditioning unused; nothing in the file is executed.

    Raises ValueError if the file is missing, truncated, or has no such network, naming the file.

        D = load_r3gan("r3gan-cifar10.pkl")
    """
    if is_safetensors(path):
        tensors = read_described(path, FORMAT, "an R3GAN discriminator")[1]
    else:
        content = read_pickle(path)
        try:
            tensors = discriminator_weights(content)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
    try:
        return R3GANDiscriminator.from_published(None, tensors)
    except Exception as error:  # weights of odd shapes fail in any way
        raise ValueError(f"cannot use the discriminator of {path}: {' '.join(str(error).split())[:300]}") from None


def discriminator_weights(content: Any) -> dict[str, Tensor]:
    """Tensors of the record under `D`, or of the record that the content is. Raises ValueError for anything else."""
    record = content
    if isinstance(content, dict):
        record = content.get("D")
        if record is None:
            keys = ", ".join(said(key).strip("'") for key in list(content)[:8])
            raise ValueError(f"holds no discriminator under 'D': it has the keys {keys}")
    try:
        return state_dict_of(record)
    except ValueError:
        tensors = mapping_of(record) or {}
        if tensors and all(isinstance(value, Tensor) for value in tensors.values()):
            bounded(tensors.values())
            return {str(name): value for name, value in tensors.items()}
        raise ValueError(f"holds no discriminator under 'D', but {said(record)}, no torch module") from None
