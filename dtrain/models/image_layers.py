"""What the networks for images share: convolutions, norms, and the head that pools.

Convolutions are drawn as in He et al., "Delving deep into rectifiers", arXiv 1502.01852: normal
with variance 2 / n, n = kernel^2 * inputs (eq. 10), biases zero. Norms start at scale 1 and shift
0, heads as torch's own `nn.Linear`.

Invariant: nothing here draws random numbers while it runs, nor writes to what enters.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from dtrain.errors import ConfigError

Norm = Literal["batch", "group", "none"]


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a convolution (n, inputs, H, W) to (n, outputs, ceil(H / stride), ceil(W / stride)).

    Parameters
    ----------
    kernel : int
        Height and width in pixels, odd; the image is padded with zeros by (kernel - 1) / 2.
    bias : bool
        Whether each channel has one; a norm that follows makes it idle.
    """
    made = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(made.weight, nonlinearity="relu")
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made


def norm(kind: Norm, channels: int, groups: int, spatial: bool = True) -> nn.Module:
    """Return the norm of (n, channels, H, W), or of (n, channels) where it is not spatial.

    Parameters
    ----------
    kind : str
        "batch": statistics of the micro-batch, which couple its samples. "group": of each sample
        alone (Wu and He, arXiv 1803.08494). "none": the identity.
    groups : int
        Of channels, for "group".

    Raises
    ------
    DtrainError
        Channels that do not fall into that many groups.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels) if spatial else nn.BatchNorm1d(channels)
    if groups < 1 or channels % groups:
        legal = [each for each in range(1, min(channels, 32) + 1) if channels % each == 0]
        raise ConfigError(
            "todo.key",
            f"groups = {groups}: {channels} channels do not fall into {groups} equal groups: set "
            f"groups = {', '.join(map(str, legal))}",
        )
    return nn.GroupNorm(groups, channels)


def channels_last(images: Tensor) -> Tensor:
    """Return images (n, C, H, W) in the memory order in which convolutions are fastest on a CPU.

    Channels last: a residual network of 20 layers takes 0.83 of the time, its layers at full
    resolution 0.70 (128 images, one thread). Weights and gradients stay as they are, so nobody
    else need know.
    """
    return images.contiguous(memory_format=torch.channels_last)


def image_shape(model: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return channels, height and width of a sample; refuse what is no image."""
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(
            "todo.key",
            f"model '{model}' needs images (channels, height, width), but a sample of the data has "
            f"shape {shape}: use model 'mlp', or give the data as images",
        )
    return shape


@final
class Convolution(nn.Module):
    """3x3 convolution, norm, ReLU, and 2x2 maximum where it `pools`."""

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
        made = torch.relu(self.norm(self.conv(channels_last(input))))
        return max_pool2d(made, 2) if self.pool else made


@final
class PooledLinear(nn.Linear):
    """Mean over all pixels, linear: (n, inputs, H, W) to (n, outputs)."""

    uses_rng = False

    def forward(self, input: Tensor) -> Tensor:
        """Return mean(x) W^T + b."""
        return super().forward(input.mean((2, 3)))
