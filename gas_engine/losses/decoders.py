"""Losses in pixels for latent models: through a frozen decoder, by chunks of samples or by tiles.

Shape legend: b samples, C H W of latents, s pixels per latent in each direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..memory import lean
from ._measure import Made, Measure, Piece
from .distillation import DistillationLoss

Decoder = Callable[[Tensor], Any]


def decoded(
    loss: DistillationLoss, decoder: nn.Module | Decoder, *, chunk: int = 1, tile: int | None = None, overlap: int = 8
) -> DistillationLoss:
    """The same loss in pixels: ``loss(decoder(x), decoder(y))`` for latents x, y [B, C, H, W] -> [B].

    ``decoder``: frozen; latents [b, C, H, W] -> images [b, 3, s H, s W], or a record with them as its ``sample``, as
    diffusers' decoders give; scaling and shift of the latents are its business. A module runs as a ``lean`` view.
    ``chunk`` samples at a time, exactly: the graph of one chunk is alive, no more; images of the teacher's samples are
    made without a graph, and kept within the loss's ``cache``, whose limit is the loss's own.

    ``tile``: latents per side of tiles that are decoded one after the other, for decoders whose graph of one sample is
    too large. Each is decoded with ``overlap`` more latents around it, which are cut off again, and the loss is the
    mean over tiles by their area. That is exact for a decoder of convolutions that reach no further than ``overlap``
    under a mean over pixels. It is **approximate** for the usual autoencoders, whose group norms and attention see
    one tile at a time, and for LPIPS, which then compares tiles instead of the whole.
    Raises ValueError for a tile below 1, a negative overlap, trainable weights, or images of no whole scale.

        loss = decoded(distillation_loss("lpips"), VAE(pipeline.vae), chunk=1)
    """
    if (tile is not None and tile < 1) or overlap < 0:
        raise ValueError(f"tile must be at least 1 and overlap at least 0, got {tile} and {overlap}")
    if isinstance(decoder, nn.Module) and any(p.requires_grad for p in decoder.parameters()):
        raise ValueError("the decoder has trainable weights; freeze it with decoder.requires_grad_(False)")
    images = Images(decoder)
    measure: Measure = Decoded(loss.measure, images) if tile is None else Tiled(loss.measure, images, tile, overlap)
    return DistillationLoss(measure, chunk, loss.cache.limit if loss.cache else 0)


class VAE(nn.Module):
    """Decoder of a diffusers autoencoder, frozen as it is: ``decode(z / scaling_factor + shift_factor)``."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()

    def forward(self, z: Tensor) -> Tensor:
        config = self.vae.config
        z = z / (getattr(config, "scaling_factor", None) or 1.0) + (getattr(config, "shift_factor", None) or 0.0)
        return self.vae.decode(z, return_dict=False)[0]


class Images:
    """A decoder as a function from latents to images, and the bytes of its weights."""

    def __init__(self, decoder: nn.Module | Decoder) -> None:
        self.decoder, self.weight_bytes = decoder, 0
        if isinstance(decoder, nn.Module):
            self.decoder, self.weight_bytes = lean(decoder), sum(p.nbytes for p in decoder.parameters())

    def __call__(self, z: Tensor) -> Tensor:
        images = self.decoder(z)
        return images if isinstance(images, Tensor) else images.sample


class Decoded(Measure):
    """A measure of decoded samples; ``keep``: which latents' pixels count, by rows and columns."""

    def __init__(self, inner: Measure, images: Images, keep: tuple[slice, slice] | None = None) -> None:
        self.inner, self.images, self.keep = inner, images, keep
        self.weight_bytes = inner.weight_bytes + images.weight_bytes
        self.makes = 1 + inner.makes

    def made(self, y: Tensor) -> Made:
        pixels = self._pixels(y)
        return (pixels, *self.inner.made(pixels))

    def of(self, x: Tensor, y: Tensor, made: Made) -> Tensor:
        return self.inner.of(self._pixels(x), made[0], made[1:])

    def _pixels(self, z: Tensor) -> Tensor:
        images = self.images(z)
        if self.keep is None:
            return images
        sides = []
        for kept, pixels, latents in zip(self.keep, images.shape[-2:], z.shape[-2:], strict=True):
            scale, rest = divmod(pixels, latents)
            if rest or not scale:
                raise ValueError(
                    f"tiles need a whole number of pixels per latent, got {list(z.shape)} -> {list(images.shape)}"
                )
            sides.append(slice(kept.start * scale, kept.stop * scale))
        rows, columns = sides
        return images[..., rows, columns]


class Tiled(Measure):
    """A measure of decoded samples, tile by tile, weighted by their areas."""

    def __init__(self, inner: Measure, images: Images, tile: int, overlap: int) -> None:
        self.inner, self.images, self.tile, self.overlap = inner, images, tile, overlap
        self.weight_bytes = inner.weight_bytes + images.weight_bytes

    def pieces(self, shape: Sequence[int]) -> list[Piece]:
        _, height, width = shape
        found = []
        for rows, kept_rows in self._spans(height):
            for columns, kept_columns in self._spans(width):
                area = (kept_rows.stop - kept_rows.start) * (kept_columns.stop - kept_columns.start)
                measure = Decoded(self.inner, self.images, (kept_rows, kept_columns))
                found.append(Piece((rows, columns), measure, area / (height * width)))
        return found

    def _spans(self, length: int) -> list[tuple[slice, slice]]:
        """Windows along one side, and what counts within each."""
        spans = []
        for start in range(0, length, self.tile):
            stop = min(start + self.tile, length)
            low, high = max(0, start - self.overlap), min(length, stop + self.overlap)
            spans.append((slice(low, high), slice(start - low, stop - low)))
        return spans
