"""Reversible residual networks for images: `stem`, units with two streams, `head`.

Every unit is one residual function of one stream, added to the other stream; then the streams are
exchanged. The first unit at every resolution but the first halves the image and doubles the
channels: it is not reversible. The residual functions are those of He et al. 2016, "Identity
mappings in deep residual networks": norm, ReLU, convolution, twice.

Invariant: the network can be cut between any two units, and one tensor crosses the cut: both
streams.

Sources: Gomez et al. 2017, "The Reversible Residual Network", arXiv 1707.04585; Rivaud et al. 2025,
"PETRA", ICLR 2025 (streams as wide as those of a ResNet).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.models.image_layers import (
    Convolution,
    Norm,
    PooledLinear,
    channels_last,
    conv,
    image_shape,
    norm,
)
from dtrain.models.layers import Factory, NamedFactories
from dtrain.models.reversible import ResidualCoupling, join_streams, split_streams


@final
@dataclass(frozen=True)
class RevNet:
    """A reversible residual network; the defaults have the units and widths of ResNet-18.

    Parameters
    ----------
    units : list of int
        Units at each resolution; eight in the default.
    width : int
        Channels of a stream at the first resolution, doubled at each next one.
    norm : str
        "batch", "group" or "none"; with "none" convolutions have biases.
    groups : int
        Groups of channels, for "group".

    Raises
    ------
    ConfigError
        No units at a resolution, or a width below 1.
    """

    units: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    norm: Norm = "batch"
    groups: int = 8

    def __post_init__(self) -> None:
        if not self.units or min(self.units) < 1 or self.width < 1:
            raise ConfigError(
                "model.revnet-size",
                f"[model] units = {list(self.units)}, width = {self.width}: set at least one unit "
                "at each resolution, and a width of 1 or more",
            )

    def layers(self, shape: tuple[int, ...], classes: int) -> NamedFactories:
        """Return the layers for images of `shape`, as (name, factory) pairs.

        ::

            (C, H, W) -> stem -> unit1-1 ... unit1-n      (2 w, H, W)
                              -> unit2-1 ... unit2-n      (4 w, H/2, W/2), rounded up
                              -> ...
                              -> head                     (classes,)

        Raises
        ------
        ConfigError
            The samples are no images.
        """
        inputs, *_ = image_shape("revnet", shape)
        options = self.norm, self.groups
        layers: list[tuple[str, Factory]] = [
            ("stem", partial(TwoStreams, inputs, self.width, *options))
        ]
        for resolution, units in enumerate(self.units):
            width = self.width << resolution
            for number in range(units):
                factory: Factory = partial(RevNetUnit, width, *options)
                if resolution > 0 and number == 0:
                    factory = partial(Downsampling, width // 2, width, *options)
                layers.append((f"unit{resolution + 1}-{number + 1}", factory))
        width = 2 * self.width << (len(self.units) - 1)
        return [*layers, ("head", partial(NormedHead, width, classes, *options))]


@final
class TwoStreams(Convolution):
    """3x3 convolution, norm and ReLU, as two equal streams (n, 2 outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, kind: Norm, groups: int) -> None:
        super().__init__(inputs, outputs, kind, groups)

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, 2 outputs, H, W)."""
        output = super().forward(input)
        return join_streams(output, output)


@final
class Residual(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice: (n, inputs, H, W) to (n, outputs, H/s, W/s)."""

    uses_rng = False

    def __init__(self, inputs: int, outputs: int, stride: int, kind: Norm, groups: int) -> None:
        super().__init__()
        bias = kind == "none"
        self.norm1 = norm(kind, inputs, groups)
        self.conv1 = conv(inputs, outputs, 3, stride, bias)
        self.norm2 = norm(kind, outputs, groups)
        self.conv2 = conv(outputs, outputs, 3, 1, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return what is added to the other stream."""
        # Not channels last before the norm: torch's GroupNorm crashes there where the gradient of
        # its input is not needed.
        middle = self.conv1(channels_last(torch.relu(self.norm1(input))))
        output: Tensor = self.conv2(torch.relu(self.norm2(middle)))
        return output


@final
class RevNetUnit(ResidualCoupling):
    """A reversible unit: a residual function of one stream (n, width, H, W)."""

    uses_rng = False

    def __init__(self, width: int, kind: Norm, groups: int) -> None:
        super().__init__(Residual(width, width, 1, kind, groups))


@final
class Downsampling(nn.Module):
    """A unit that halves the image; it is not reversible.

    ::

        y1 = shortcut1(x2)        y2 = shortcut2(x1) + f(x2)      shortcuts: 1x1 convolution, norm
    """

    uses_rng = False

    def __init__(self, inputs: int, outputs: int, kind: Norm, groups: int) -> None:
        super().__init__()
        self.f = Residual(inputs, outputs, 2, kind, groups)
        self.shortcut1 = _projection(inputs, outputs, kind, groups)
        self.shortcut2 = _projection(inputs, outputs, kind, groups)

    def forward(self, input: Tensor) -> Tensor:
        """Return the two streams (n, 2 outputs, H/2, W/2), rounded up."""
        x1, x2 = split_streams(input)
        y1, shortcut2 = self.shortcut1(channels_last(x2)), self.shortcut2(channels_last(x1))
        return join_streams(y1, shortcut2 + self.f(x2))


def _projection(inputs: int, outputs: int, kind: Norm, groups: int) -> nn.Module:
    return nn.Sequential(conv(inputs, outputs, 1, 2, kind == "none"), norm(kind, outputs, groups))


@final
class NormedHead(PooledLinear):
    """Norm, ReLU, global average pooling and a linear layer: (n, inputs, H, W) to (n, outputs)."""

    def __init__(self, inputs: int, outputs: int, kind: Norm, groups: int) -> None:
        super().__init__(inputs, outputs)
        self.norm = norm(kind, inputs, groups)

    def forward(self, input: Tensor) -> Tensor:
        """Return the class scores."""
        return super().forward(torch.relu(self.norm(input)))
