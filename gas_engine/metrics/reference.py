"""What samples are compared with: embedded data, a directory of images, or published statistics.

Shape legend: N images, C channels, H W height and width, F features.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..adapters.digits import DIGITS
from ..adapters.photos import photo_crops
from .features import real_digits
from .frechet import Normal

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
BATCH = 256


def embedded_data(model: str) -> Tensor | None:
    """Images of the data that an embedded model was trained on, [N, C, H, W] in [-1, 1]; None for all others."""
    if model in DIGITS:
        return real_digits()
    if model == "photos":
        return photo_crops(4096, torch.Generator().manual_seed(0))
    return None


@dataclass(frozen=True)
class Reference:
    """``count`` images, of which ``read(i)`` gives up to ``BATCH`` from the i-th on, [b, C, H, W] in [-1, 1]; or
    statistics of their features, or both. ``identity``: a checksum of the content."""

    name: str
    identity: str
    count: int = 0
    read: Callable[[int], Tensor] | None = None
    normal: Normal | None = None
    spatial: Normal | None = None


def open_reference(name: str, model: str, shape: tuple[int, ...]) -> Reference:
    """The reference by what the user calls it: ``data``, a directory, or an .npz; pictures are of ``shape`` [C, H, W].

    An .npz holds ``mu`` and ``sigma`` as EDM's does, ``mu_s`` and ``sigma_s`` beside as ADM's, or images ``arr_0``
    [N, H, W, C], uint8; nothing in it is executed. Raises ValueError for what is missing, unreadable, of another size.
    """
    path = Path(name)
    if name == "data":
        images = embedded_data(model)
        if images is None:
            raise ValueError(f"no data come with {model}; give --reference a directory of images, or an .npz")
        identity = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        return Reference("data", identity, len(images), lambda i: images[i : i + BATCH])
    if path.is_dir():
        return _directory(path, shape)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path, shape)
    raise ValueError(f"--reference must be data, a directory of images, or an .npz of statistics, got {name!r}")


def _directory(path: Path, shape: tuple[int, ...]) -> Reference:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"there are no images in {path} (looked for {', '.join(SUFFIXES)}, in its folders as well)")
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())

    def read(start: int) -> Tensor:
        return torch.stack([_image(file, shape) for file in files[start : start + BATCH]])

    return Reference(str(path), digest.hexdigest(), len(files), read)


def _image(file: Path, shape: tuple[int, ...]) -> Tensor:
    channels, height, width = shape
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {file}: {error}") from None
    if pixels.shape[:2] != (height, width):
        seen = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise ValueError(f"{file} is of {seen} pixels, and the model's pictures of {width}x{height}; resize them first")
    return _scaled(torch.from_numpy(pixels.reshape(height, width, -1).copy()))


def _npz(path: Path, shape: tuple[int, ...]) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0") if name in file}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"cannot read the statistics {path}: {error}") from None
    normals: list[Normal | None] = []
    for names in (("mu", "sigma"), ("mu_s", "sigma_s")):
        given = [arrays[name] for name in names if name in arrays]
        if any(array.dtype.kind != "f" for array in given):
            raise ValueError(f"{path} holds {names[0]} and {names[1]} that are no floating point numbers")
        try:
            normals.append(Normal.of_statistics(*given) if len(given) == 2 else None)
        except ValueError as error:
            raise ValueError(f"{path} holds no statistics of features: {error}") from None
    identity = hashlib.sha256(b"".join(name.encode() + array.tobytes() for name, array in arrays.items())).hexdigest()
    images = arrays.get("arr_0")
    if images is None:
        if normals[0] is None:
            raise ValueError(f"{path} holds neither mu and sigma nor images arr_0")
        return Reference(str(path), identity, normal=normals[0], spatial=normals[1])
    channels, height, width = shape
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) or images.shape[1:] != (height, width, channels):
        raise ValueError(
            f"{path} holds arr_0 of {images.dtype} {list(images.shape)}; the model's pictures are uint8 "
            f"[N, {height}, {width}, {channels}]"
        )

    pictures = images

    def read(start: int) -> Tensor:
        return _scaled(torch.from_numpy(pictures[start : start + BATCH]))

    return Reference(str(path), identity, len(images), read, *normals)


def _scaled(pixels: Tensor) -> Tensor:
    """uint8 [..., H, W, C] -> [..., C, H, W] in [-1, 1]."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1
