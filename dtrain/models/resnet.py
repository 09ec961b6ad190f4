"""Residual networks for small images: `stem`, residual units, `head`.

He et al., "Deep residual learning for image recognition", arXiv 1512.03385, section 4.2: depth
6 n + 2, n units at each of three resolutions, with 16, 32 and 64 channels. The paper's shortcuts
there are option A: no parameters, every second pixel, zeros for the new channels. Option B is a
projection. Initialisation: see `image_layers`.

Invariant: the network can be cut between any two units, and one tensor crosses the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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

Shortcut = Literal["identity", "projection"]


RESOLUTIONS = 3


@final
@dataclass(frozen=True)
class ResNet:
    """A CIFAR ResNet with 6 n + 2 weight layers.

    Parameters
    ----------
    depth : int
        14, 20, 32, 44, 56, 110 or any other 6 n + 2 with n >= 1.
    width : int
        Channels at the first resolution, doubled at each next one. 16 k is the paper's times k.
    norm : str
        "batch", "group" or "none"; with "none" convolutions have biases.
    groups : int
        Groups of channels, for "group".
    shortcut : str
        Shortcut where the resolution halves: "identity" (option A) or "projection" (option B, 1x1
        convolution and norm).

    Raises
    ------
    ConfigError
        A depth that is not 6 n + 2, or a width below 1.
    """

    depth: int = 20
    width: int = 16
    norm: Norm = "batch"
    groups: int = 8
    shortcut: Shortcut = "identity"

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            below = self.depth - (self.depth - 2) % 6
            legal = f"{below} or {below + 6}" if below >= 8 else "8 or 14"
            raise ConfigError(
                "model.resnet-depth",
                f"[model] depth = {self.depth} must be 6 n + 2 with n >= 1: set depth = {legal}",
            )
        if self.width < 1:
            raise ConfigError("model.resnet-width", f"[model] width = {self.width} must be >= 1")

    def layers(self, shape: tuple[int, ...], classes: int) -> NamedFactories:
        """Return the layers for images of `shape`, as (name, factory) pairs.

        ::

            (C, H, W) -> stem -> unit1-1 ... unit1-n      (w, H, W)
                              -> unit2-1 ... unit2-n      (2 w, H/2, W/2), rounded up
                              -> unit3-1 ... unit3-n      (4 w, H/4, W/4)
                              -> head                     (classes,)

        Raises
        ------
        ConfigError
            The samples are no images.
        """
        inputs, *_ = image_shape("resnet", shape)
        layers: list[tuple[str, Factory]] = [
            ("stem", partial(Convolution, inputs, self.width, self.norm, self.groups))
        ]
        inputs = self.width
        options = self.norm, self.groups, self.shortcut
        for resolution in range(RESOLUTIONS):
            outputs = self.width << resolution
            for number in range((self.depth - 2) // 6):
                stride = 2 if resolution > 0 and number == 0 else 1
                factory = partial(ResidualUnit, inputs, outputs, stride, *options)
                layers.append((f"unit{resolution + 1}-{number + 1}", factory))
                inputs = outputs
        return [*layers, ("head", partial(PooledLinear, inputs, classes))]


@final
class ResidualUnit(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    ::

        x --> conv1 - norm1 - ReLU - conv2 - norm2 --(+)-- ReLU --> (n, outputs, H/s, W/s)
          \\-------------- shortcut ------------------/
    """

    uses_rng = False

    def __init__(
        self, inputs: int, outputs: int, stride: int, kind: Norm, groups: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        bias = kind == "none"
        self.conv1 = conv(inputs, outputs, 3, stride, bias)
        self.norm1 = norm(kind, outputs, groups)
        self.conv2 = conv(outputs, outputs, 3, 1, bias)
        self.norm2 = norm(kind, outputs, groups)
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            self.shortcut = ZeroPadShortcut(outputs - inputs, stride)
            if shortcut == "projection":
                self.shortcut = nn.Sequential(
                    conv(inputs, outputs, 1, stride, bias), norm(kind, outputs, groups)
                )

    def forward(self, input: Tensor) -> Tensor:
        """Return relu(residual(x) + shortcut(x))."""
        input = channels_last(input)
        first = torch.relu(self.norm1(self.conv1(input)))
        return torch.relu(self.norm2(self.conv2(first)) + self.shortcut(input))


@final
class ZeroPadShortcut(nn.Module):
    """Take every `stride`-th pixel and append `extra_channels` channels of zeros (option A)."""

    uses_rng = False

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, C + extra_channels, ceil(H / stride), ceil(W / stride))."""
        pixels = input[:, :, :: self.stride, :: self.stride]
        return pad(pixels, (0, 0, 0, 0, 0, self.extra_channels))
