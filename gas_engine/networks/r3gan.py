"""The R3GAN discriminator: residual blocks of grouped convolutions, no norms, one kind of nonlinearity.

Huang et al., "The GAN is dead; long live the GAN! A Modern Baseline GAN" (arXiv 2501.05441), section 4; constructor
values and tensor names are the published ones.
Shape legend: B batch, C channels, H W height and width, E embedding channels.
The network follows the dtype of its input, so it runs in float32 and, for checks, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._bounded import BuiltFor
from ._r3gan_layers import ACTIVATION_GAIN, Head, Layer, Linear, ResidualBlock, Stage, Transition, apply


class R3GANDiscriminator(nn.Module):
    """One logit per image: x [B, C, H, W] -> [B], with H = W = 4 * 2^(stages - 1).

    A stage i has `blocks[i]` residual blocks of width `widths[i]`, `expansion` times wider inside, with a 3x3
    convolution in `cardinalities[i]` groups; between stages the image is halved by `resample_filter` (arXiv
    2501.05441, section 4). The defaults (22.4 M parameters) are for 64 x 64, see `discriminator_for`. With `classes`,
    the `embedding` features are multiplied by a linear embedding of the class and summed (default 64
    features); without, just summed (default one). `cond` is class indices [B] or one-hot [B, classes], and not used
    without classes.

    Piecewise linear in x: convolutions without bias, and leaky ReLU. Frozen, or under no_grad, its graph keeps one bit
    for each activation and nothing else. Raises ValueError for lengths that differ, widths that the cardinality does
    not divide, images of another size, and missing classes.

        D = R3GANDiscriminator()
        logits = D(torch.randn(8, 3, 64, 64))
    """

    def __init__(
        self,
        widths: Sequence[int] = (384, 768, 768, 768, 768),
        cardinalities: Sequence[int] = (48, 96, 96, 96, 96),
        blocks: Sequence[int] = (2, 2, 2, 2, 2),
        expansion: int = 2,
        channels: int = 3,
        classes: int | None = None,
        embedding: int | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__()
        if not len(widths) == len(cardinalities) == len(blocks) > 0:
            raise ValueError(
                f"widths, cardinalities and blocks are one number for each stage, got {len(widths)}, "
                f"{len(cardinalities)} and {len(blocks)} numbers"
            )
        for width, cardinality in zip(widths, cardinalities, strict=True):
            if width < 1 or cardinality < 1 or width * expansion % cardinality:
                raise ValueError(f"cardinality {cardinality} does not divide {expansion} x width {width}")
        self.size = 4 * 2 ** (len(widths) - 1)
        self.channels, self.classes = channels, classes
        self.largest_activation = max(w * expansion * (self.size >> i) ** 2 for i, w in enumerate(widths))
        features = embedding or (64 if classes else 1)
        gain = ACTIVATION_GAIN * max(1, sum(blocks)) ** -0.25
        stages = []
        for i, (width, cardinality, count) in enumerate(zip(widths, cardinalities, blocks, strict=True)):
            inside = [ResidualBlock(width, cardinality, expansion, gain) for _ in range(count)]
            last = i == len(widths) - 1
            out: Transition | Head = (
                Head(width, features) if last else Transition(width, widths[i + 1], resample_filter)
            )
            stages.append(Stage(inside, out))
        self.ExtractionLayer = Layer(channels, widths[0], 1)
        self.MainLayers = nn.ModuleList(stages)
        if classes:
            self.EmbeddingLayer = Linear(classes, features)

    def chain(self) -> list[nn.Module]:
        """x -> features [B, E]: what is applied, in order."""
        return [self.ExtractionLayer, *self.MainLayers]

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        self.check(x)
        x = apply(self.chain(), x)
        if not self.classes:
            return x.sum(1)
        return (x * self.EmbeddingLayer(self.one_hot(cond, x))).sum(1)

    def check(self, x: Tensor) -> None:
        """Raise ValueError for images that the network is not made for."""
        if x.dim() != 4 or x.shape[1:] != (self.channels, self.size, self.size):
            raise ValueError(
                f"this discriminator takes [B, {self.channels}, {self.size}, {self.size}], got {list(x.shape)}; "
                "discriminator_for(shape) makes one for another size"
            )

    def one_hot(self, cond: Any, like: Tensor) -> Tensor:
        """Classes [B], or one-hot [B, classes] as it is, in the dtype of `like`."""
        assert self.classes
        if cond is None:
            raise ValueError(f"this discriminator is conditional: give the classes (0 to {self.classes - 1})")
        cond = torch.as_tensor(cond, device=like.device)
        if cond.dim() == 1 and not cond.is_floating_point():
            cond = F.one_hot(cond.long(), self.classes)
        if cond.shape != (len(like), self.classes):
            raise ValueError(
                f"classes must be integers [{len(like)}] or one-hot [{len(like)}, {self.classes}], "
                f"got {cond.dtype} {list(cond.shape)}"
            )
        return cond.to(like.dtype)

    @classmethod
    def from_published(cls, kwargs: Mapping[str, Any] | None, state: Mapping[str, Any]) -> R3GANDiscriminator:
        """The discriminator of published weights, its conditioning unused.

        Stages are those of the published arguments WidthPerStage, CardinalityPerStage, BlocksPerStage and
        ExpansionFactor, or, with None, of the weights' shapes, as are channels, features and filter. Raises ValueError
        for arguments or weights that are missing.
        """
        state = _published(state)
        try:
            names = ("WidthPerStage", "CardinalityPerStage", "BlocksPerStage", "ExpansionFactor")
            widths, cardinalities, blocks, expansion = _stages(state) if kwargs is None else (kwargs[n] for n in names)
            head = state[f"MainLayers.{len(widths) - 1}.Layers.{blocks[-1]}.LinearLayer.weight"]
        except KeyError as error:
            raise ValueError(f"this is no complete R3GAN discriminator: {error} is missing") from None
        kernel = next((v for name, v in state.items() if name.endswith(".Resampler.Kernel")), None)
        with BuiltFor(state.values()):
            network = cls(
                widths,
                cardinalities,
                blocks,
                expansion,
                channels=state["ExtractionLayer.Layer.weight"].shape[1],
                embedding=head.shape[0],
                resample_filter=(1, 3, 3, 1) if kernel is None else kernel.sum(0).tolist(),
            )
        network.load_published(state)
        return network

    def load_published(self, state: Mapping[str, Any]) -> None:
        """Copy published weights by tensor name; a class embedding becomes ones, so that conditioning is unused.

        Raises ValueError, with the names, for tensors that are missing, left over or of another shape.
        """
        state = _published(state)
        if self.classes:
            state["EmbeddingLayer.weight"] = torch.ones_like(self.EmbeddingLayer.weight)
        for name, kernel in self.named_buffers():
            given = state.get(name, kernel).to(kernel)
            if given.shape != kernel.shape or not torch.allclose(given, kernel, atol=1e-6):
                raise ValueError(f"{name} is not the filter of this network: give its row sums as resample_filter")
        try:
            self.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit this discriminator: {' '.join(str(error).split())}") from None


def _stages(state: Mapping[str, Tensor]) -> tuple[list[int], list[int], list[int], int]:
    """Widths, cardinalities, blocks and expansion, as the shapes of the blocks tell them."""
    count = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("MainLayers."))
    if not 1 <= count <= 16:
        raise ValueError(f"an R3GAN discriminator has 1 to 16 stages, these weights name {count}")
    block = [f"MainLayers.{i}.Layers.0.LinearLayer" for i in range(count)]
    widths = [state[f"{b}1.Layer.weight"].shape[1] for b in block]
    grouped = [state[f"{b}2.Layer.weight"].shape for b in block]  # [inner, inner / cardinality, 3, 3]
    blocks = [sum(n.startswith(f"MainLayers.{i}.") and "LinearLayer1" in n for n in state) for i in range(count)]
    return widths, [shape[0] // shape[1] for shape in grouped], blocks, grouped[0][0] // widths[0]


def _published(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, without the prefix of a wrapper and without the class embedding."""
    anchor = "ExtractionLayer.Layer.weight"
    found = next((name for name in state if name.endswith(anchor)), None)
    if found is None:
        raise ValueError(f"these are no weights of an R3GAN discriminator: none of {len(state)} tensors is {anchor}")
    prefix = found[: -len(anchor)]
    tensors = {
        name[len(prefix) :]: torch.as_tensor(value).float() for name, value in state.items() if name.startswith(prefix)
    }
    return {name: value for name, value in tensors.items() if not name.startswith("EmbeddingLayer.")}


# stages -> widths, cardinalities: a toy trains in milliseconds; 32 and 64 are those of arXiv 2510.17699.
_SIZES: dict[int, tuple[list[int], list[int]]] = {
    1: ([64], [8]),
    2: ([64, 128], [8, 16]),
    3: ([64, 128, 256], [8, 16, 32]),
    4: ([768] * 4, [96] * 4),
    5: ([384] + [768] * 4, [48] + [96] * 4),
    6: ([192, 384] + [768] * 4, [24, 48] + [96] * 4),
    7: ([96, 192, 384] + [768] * 4, [12, 24, 48] + [96] * 4),
}


def discriminator_for(shape: Sequence[int], classes: int | None = None) -> R3GANDiscriminator:
    """A discriminator for states of shape [C, H, W], H = W = 4, 8, ... 256, two blocks a stage.

    64 x 64 gets the default of `R3GANDiscriminator`, 32 x 32 four stages of width 768, smaller states a light one (8 x
    8: 0.3 M parameters). Raises ValueError for other shapes.

        D = discriminator_for((4, 64, 64))
    """
    sizes = {4 * 2 ** (stages - 1): stages for stages in _SIZES}
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] not in sizes:
        raise ValueError(
            f"no discriminator for states of shape {list(shape)}: they must be [C, H, W] with H = W one of "
            f"{', '.join(map(str, sizes))}; crop or pad the states, or give R3GANDiscriminator other stages"
        )
    widths, cardinalities = _SIZES[sizes[shape[1]]]
    return R3GANDiscriminator(widths, cardinalities, [2] * len(widths), channels=shape[0], classes=classes)
