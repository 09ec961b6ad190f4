"""U-Net: `down1` ... `downN`, `middle`, `upN` ... `up1`, `head`; skips pass over the cuts.

Source: Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation",
arXiv 1505.04597, with padded convolutions, so that an output has the size of its image.

Invariant: the network can be cut before any layer. The output of `downI` is a skip to `upI`: a
message of its own where blocks lie between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from dtrain.errors import ConfigError
from dtrain.models.image_layers import Norm, channels_last, conv, image_shape, norm
from dtrain.models.output_spec import OutputModel, OutputSpec


@final
@dataclass(frozen=True)
class UNet(OutputModel):
    """Convolutions at resolutions that halve and double again, with skips between equal ones.

    Parameters
    ----------
    widths : tuple of int
        Channels at each resolution, from the finest; the last one is that of `middle`.
    norm : str
        "batch", "group" or "none"; with "none" convolutions have biases.
    groups : int
        Groups of channels, for "group".

    Raises
    ------
    ConfigError
        Fewer than two widths, or one below 1.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    norm: Norm = "batch"
    groups: int = 8

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ConfigError(
                "model.unet-widths",
                f"[model] widths = {list(self.widths)}: give the channels at two or more "
                "resolutions, as in widths = [32, 64, 128]",
            )

    def layers(self, shape: tuple[int, ...], output: OutputSpec) -> nn.Module:
        """Return the network for images of `shape` as a module.

        ::

            (C, H, W) -> down1 -------------------------- skip ---> up1 -> head -> (K, H, W)
                           -> down2 ---- skip ---> up2 --->
                                -> middle --->

        Raises
        ------
        ConfigError
            The samples are no images, too small or of odd sizes; or the output has another size.
        """
        channels, height, width = image_shape("unet", shape)
        factor = 1 << (len(self.widths) - 1)
        if height % factor or width % factor:
            raise ConfigError(
                "model.unet-size",
                f"[model] widths has {len(self.widths)} resolutions, so height and width must be "
                f"multiples of {factor}, but an image has {height}x{width} pixels: give fewer",
            )
        positions = output.shape[1:] if output.class_axis is None else output.positions
        if positions != (height, width):
            raise ConfigError(
                "model.unet-output",
                f"model 'unet' returns an image of {height}x{width} pixels, but the targets need "
                f"an output of shape {output.shape}: use model 'cnn', 'resnet' or 'vit'",
            )
        classes_last = output.class_axis == -1
        return UNetModule(
            channels, output.classes, self.widths, self.norm, self.groups, classes_last
        )


@final
class UNetModule(nn.Module):
    """The network; its forward is traced, and each part is a layer."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        widths: tuple[int, ...],
        kind: Norm,
        groups: int,
        classes_last: bool,
    ) -> None:
        super().__init__()
        self.levels = range(1, len(widths))
        inputs = channels
        for level in self.levels:
            self.add_module(
                f"down{level}", Down(inputs, widths[level - 1], kind, groups, level > 1)
            )
            inputs = widths[level - 1]
        self.middle = Down(inputs, widths[-1], kind, groups, pool=True)
        for level in reversed(self.levels):
            self.add_module(f"up{level}", Up(widths[level], widths[level - 1], kind, groups))
        self.head = PixelHead(widths[0], outputs, classes_last)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (n, outputs, H, W), or with the outputs last."""
        skips = {}
        for level in self.levels:
            skips[level] = x = self.get_submodule(f"down{level}")(x)
        x = self.middle(x)
        for level in reversed(self.levels):
            x = self.get_submodule(f"up{level}")(x, skips[level])
        y: Tensor = self.head(x)
        return y


class TwoConvolutions(nn.Module):
    """Two 3x3 convolutions, each with norm and ReLU."""

    uses_rng = False

    def __init__(self, inputs: int, outputs: int, kind: Norm, groups: int) -> None:
        super().__init__()
        bias = kind == "none"
        self.conv1 = conv(inputs, outputs, 3, bias=bias)
        self.norm1 = norm(kind, outputs, groups)
        self.conv2 = conv(outputs, outputs, 3, bias=bias)
        self.norm2 = norm(kind, outputs, groups)

    def convolve(self, x: Tensor) -> Tensor:
        """Return (n, outputs, H, W)."""
        hidden = torch.relu(self.norm1(self.conv1(channels_last(x))))
        return torch.relu(self.norm2(self.conv2(hidden)))


@final
class Down(TwoConvolutions):
    """2x2 max pooling if `pool`, then two convolutions: (n, inputs, H, W) to half of H and W."""

    def __init__(self, inputs: int, outputs: int, kind: Norm, groups: int, pool: bool) -> None:
        super().__init__(inputs, outputs, kind, groups)
        self.pool = pool

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, outputs, H, W), or half of H and W."""
        return self.convolve(max_pool2d(input, 2) if self.pool else input)


@final
class Up(TwoConvolutions):
    """A transposed convolution that doubles H and W, beside the skip, then two convolutions."""

    def __init__(self, inputs: int, outputs: int, kind: Norm, groups: int) -> None:
        super().__init__(2 * outputs, outputs, kind, groups)
        self.grow = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)

    def forward(self, input: Tensor, skip: Tensor) -> Tensor:
        """Return (n, outputs, 2 H, 2 W) of (n, inputs, H, W) and the skip of the result's
        shape."""
        return self.convolve(torch.cat([skip, self.grow(input)], 1))


@final
class PixelHead(nn.Module):
    """A linear layer at each pixel: (n, inputs, H, W) to (n, outputs, H, W)."""

    uses_rng = False

    def __init__(self, inputs: int, outputs: int, classes_last: bool) -> None:
        super().__init__()
        self.linear = nn.Conv2d(inputs, outputs, 1)
        self.classes_last = classes_last

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs, in the last dimension if `classes_last`."""
        output: Tensor = self.linear(input)
        return output.movedim(1, -1) if self.classes_last else output
