"""A plain convolutional network like VGG, for small images: `conv1` ... `convN`, then `head`.

Simonyan and Zisserman, arXiv 1409.1556: 3x3 convolutions, each with ReLU, and 2x2 max pooling where
the resolution halves. Unlike VGG, each convolution may have a norm, and the head is global average
pooling and one linear layer instead of three wide ones. Initialisation: see `image_layers`.

Invariant: a layer ends with its pooling, so that the smaller tensor crosses a cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

from dtrain.errors import ConfigError
from dtrain.models.image_layers import Convolution, Norm, PooledLinear, image_shape
from dtrain.models.layers import Factory, NamedFactories
from dtrain.schema import toml_text


@final
@dataclass(frozen=True)
class Cnn:
    """Convolutions at resolutions that halve each time.

    Parameters
    ----------
    widths : tuple of tuple of int
        Channels of each convolution, one list per resolution. VGG-11 is
        ``[[64], [128], [256, 256], [512, 512], [512, 512]]``.
    norm : str
        "batch", "group" or "none"; with "none" convolutions have biases.
    groups : int
        Groups of channels, for "group".

    Raises
    ------
    ConfigError
        A resolution without convolutions, or a convolution without channels.
    """

    widths: tuple[tuple[int, ...], ...] = ((32, 32), (64, 64), (128, 128))
    norm: Norm = "batch"
    groups: int = 8

    def __post_init__(self) -> None:
        if not self.widths or not all(widths and min(widths) >= 1 for widths in self.widths):
            raise ConfigError(
                "model.cnn-widths",
                f"[model] widths = {toml_text(self.widths)}: give one list per resolution, each "
                f"with the channels of its convolutions, as in widths = [[64], [128], [256, 256]]",
            )

    def layers(self, shape: tuple[int, ...], classes: int) -> NamedFactories:
        """Return the layers for images of `shape`, as (name, factory) pairs.

        ::

            widths = [[a], [b, c]]     (C, H, W) -> conv1 -> (a, H/2, W/2)     pooled
                                    -> conv2 -> (b, H/2, W/2) -> conv3 -> (c, H/2, W/2)
                                    -> head -> (classes,)

        Raises
        ------
        ConfigError
            The samples are no images, or too small for so many resolutions.
        """
        inputs, height, width = image_shape("cnn", shape)
        limit = min(height, width).bit_length()
        if len(self.widths) > limit:
            raise ConfigError(
                "model.cnn-resolutions",
                f"[model] widths has {len(self.widths)} resolutions, but an image of "
                f"{height}x{width} pixels can be halved {limit - 1} times: give at most {limit} "
                f"lists",
            )
        layers: list[tuple[str, Factory]] = []
        for number, (outputs, pool) in enumerate(self._convolutions(), start=1):
            factory = partial(Convolution, inputs, outputs, self.norm, self.groups, pool)
            layers.append((f"conv{number}", factory))
            inputs = outputs
        return [*layers, ("head", partial(PooledLinear, inputs, classes))]

    def _convolutions(self) -> Iterator[tuple[int, bool]]:
        """Yield the channels of each convolution, and whether pooling follows it."""
        for resolution, widths in enumerate(self.widths, start=1):
            for number, outputs in enumerate(widths, start=1):
                yield outputs, number == len(widths) and resolution < len(self.widths)
