"""A plain convolutional network in the manner of VGG: `conv1` ... `convN`, then `head`.

Simonyan and Zisserman, arXiv 1409.1556, for small images: 3x3 convolutions, each with a norm and
ReLU, maximum over 2x2 pixels wherever the resolution falls, and one linear layer behind the mean
over all pixels instead of three wide ones.

Invariant: a layer ends with its pooling, so that the smaller tensor crosses a cut. Initialisation:
see `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

from dtrain.errors import ConfigError
from dtrain.models.image_layers import Convolution, Norm, PooledLinear, image_shape
from dtrain.models.layers import NamedFactories


@final
@dataclass(frozen=True)
class Cnn:
    """Convolutions by resolution, each resolution half of the one before.

    Parameters
    ----------
    widths : tuple of tuple of int
        Channels of each convolution, one list per resolution. VGG-11 is
        ``[[64], [128], [256, 256], [512, 512], [512, 512]]``.
    norm : str
        "batch", "group" or "none"; without one a convolution has a bias.
    groups : int
        Groups of channels, for "group".
    """

    widths: tuple[tuple[int, ...], ...] = ((32, 32), (64, 64), (128, 128))
    norm: Norm = "batch"
    groups: int = 8

    def __post_init__(self) -> None:
        if not self.widths or not all(part and min(part) >= 1 for part in self.widths):
            raise ConfigError(
                "todo.key",
                "[model] widths: give one list per resolution, each with the channels of its "
                "convolutions, as in widths = [[64], [128], [256, 256]]",
            )

    def layers(self, shape: tuple[int, ...], classes: int) -> NamedFactories:
        """Return the layers for images of `shape`, as (name, factory) pairs.

        ::

            widths = [[a], [b, c]]     (C, H, W) -> conv1 -> (a, H/2, W/2)     2x2 maximum behind
                                    -> conv2 -> (b, H/2, W/2) -> conv3 -> (c, H/2, W/2)
                                    -> head -> (classes,)
        """
        inputs, *size = image_shape("cnn", shape)
        most = min(size).bit_length()
        if len(self.widths) > most:
            raise ConfigError(
                "todo.key",
                f"[model] widths has {len(self.widths)} resolutions, but an image of "
                f"{size[0]}x{size[1]} pixels can be halved {most - 1} times: give at most {most} "
                f"lists",
            )
        made = []
        for number, (outputs, pools) in enumerate(self._convolutions(), start=1):
            build = partial(Convolution, inputs, outputs, self.norm, self.groups, pools)
            made.append((f"conv{number}", build))
            inputs = outputs
        return [*made, ("head", partial(PooledLinear, inputs, classes))]

    def _convolutions(self) -> Iterator[tuple[int, bool]]:
        """Yield channels of each convolution, and whether the resolution falls behind it."""
        for resolution, part in enumerate(self.widths, start=1):
            for number, outputs in enumerate(part, start=1):
                yield outputs, number == len(part) and resolution < len(self.widths)
