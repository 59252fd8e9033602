"""Published R3GAN discriminators from the pickles they come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..networks import R3GANDiscriminator
from .pickles import Record, read_pickle, state_dict_of


def load_r3gan(path: Path | str) -> R3GANDiscriminator:
    """The discriminator `D` of an R3GAN snapshot, trainable, its conditioning unused; nothing in the file is executed.

    Raises ValueError if the file is missing, truncated, or has no such network, naming the file.

        D = load_r3gan("r3gan-cifar10.pkl")
    """
    snapshot: Any = read_pickle(path)
    record = snapshot.get("D") if isinstance(snapshot, dict) else snapshot
    if not isinstance(record, Record):
        seen = f"the keys {', '.join(map(str, snapshot))}" if isinstance(snapshot, dict) else type(snapshot).__name__
        raise ValueError(f"{path} holds no discriminator under 'D': it has {seen}")
    try:
        return R3GANDiscriminator.from_published(None, state_dict_of(record))
    except ValueError as error:
        raise ValueError(f"cannot use the discriminator of {path}: {error}") from None
