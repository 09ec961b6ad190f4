"""Layers of the networks for images: convolutions, norms and the pooling head.

Convolutions are initialised as in He et al., "Delving deep into rectifiers", arXiv 1502.01852:
normal with variance 2 / n, n = kernel^2 * inputs (eq. 10), biases zero. Norms start at scale 1 and
shift 0, heads like torch's own `nn.Linear`.

Invariant: no forward pass here draws random numbers or writes to its input.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from dtrain.errors import ConfigError

Norm = Literal["batch", "group", "none"]


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Make a convolution (n, inputs, H, W) to (n, outputs, ceil(H / stride), ceil(W / stride)).

    Parameters
    ----------
    inputs, outputs : int
        Channels.
    kernel : int
        Height and width in pixels, odd; the image is padded with zeros by (kernel - 1) / 2.
    stride : int
        Pixels between two outputs.
    bias : bool
        Whether each output channel has a bias. It has no effect before a norm.
    """
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def norm(kind: Norm, channels: int, groups: int, spatial: bool = True) -> nn.Module:
    """Make the norm of (n, channels, H, W), or of (n, channels) unless `spatial`.

    Parameters
    ----------
    kind : str
        "batch": statistics of the micro-batch, which couple its samples. "group": statistics of
        each sample alone (Wu and He, arXiv 1803.08494). "none": the identity.
    channels : int
        Channels of the input.
    groups : int
        Groups of channels, for "group".

    Raises
    ------
    ConfigError
        `groups` does not divide `channels`.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels) if spatial else nn.BatchNorm1d(channels)
    if groups < 1 or channels % groups:
        legal = [count for count in range(1, min(channels, 32) + 1) if channels % count == 0]
        raise ConfigError(
            "norm.groups-indivisible",
            f"groups = {groups} does not divide {channels} channels: set groups to one of "
            f"{', '.join(map(str, legal))}",
        )
    return nn.GroupNorm(groups, channels)


def channels_last(images: Tensor) -> Tensor:
    """Return images (n, C, H, W) in channels-last memory order, the fastest on a CPU.

    ResNet-20 takes 0.83 of the time, its layers at full resolution 0.70 (128 images, one thread).
    Weights and gradients keep torch's usual order, so code outside the layer is not affected.
    """
    return images.contiguous(memory_format=torch.channels_last)


def image_shape(model: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return channels, height and width of a sample.

    Raises
    ------
    ConfigError
        The sample is no image.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(
            "model.needs-images",
            f"model '{model}' needs images (channels, height, width), but a sample of the data has "
            f"shape {shape}: use model 'mlp', or give the data as images",
        )
    return shape


class Convolution(nn.Module):
    """3x3 convolution, norm, ReLU, and 2x2 max pooling if `pool`."""

    uses_rng = False

    def __init__(
        self, inputs: int, outputs: int, kind: Norm, groups: int, pool: bool = False
    ) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, 3, bias=kind == "none")
        self.norm = norm(kind, outputs, groups)
        self.pool = pool

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, outputs, H, W), or half of H and W, rounded down."""
        output = torch.relu(self.norm(self.conv(channels_last(input))))
        return max_pool2d(output, 2) if self.pool else output


class PooledLinear(nn.Linear):
    """Global average pooling and a linear layer: (n, inputs, H, W) to (n, outputs)."""

    uses_rng = False

    def forward(self, input: Tensor) -> Tensor:
        """Return mean(x) W^T + b, the mean over H and W."""
        return super().forward(input.mean((2, 3)))
