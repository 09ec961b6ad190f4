"""Networks that a local objective puts behind a block: from its output to class scores.

::

    greedy      mean over all pixels - linear
    dgl         (c, H, W) - mean to ceil(H/4) x ceil(W/4) - 3 x (conv 1x1 - norm - ReLU)
                          - mean to 2x2 - 3 x (linear to 4c - norm - ReLU) - linear
    1c2f        conv 3x3 to 2c channels, stride 2 - norm - ReLU - mean over all pixels
                          - linear to 128 - ReLU - linear
    auglocal    units with the shapes of layers that come later - mean over all pixels - linear

Outputs that are no images are flattened: what is left are the linear layers, in "dgl" as wide as
the output, and a unit of "auglocal" is linear and ReLU.

Invariant: all of them are drawn from torch's own generator, as the caller seeded it, and none draws
while it runs.

Sources: Belilovsky et al., arXiv 1901.08164 ("greedy"; "dgl", there "MLP-SR"). Wang et al.,
"Revisiting locally supervised learning", ICLR 2021 ("1c2f"; behind 64 channels, its last
resolution, their code keeps stride 1 and 64 channels). Ma et al., arXiv 2402.17318 ("auglocal";
their code halves the image at most once per unit, whatever it samples, and has a norm before the
last linear layer where there is one unit).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Literal

from torch import nn

from dtrain.models.image_layers import Norm, PooledLinear, conv, norm
from dtrain.models.resnet import ResidualUnit as Residual

DGL_CONVOLUTIONS = 3


HIDDEN_WIDTH = 128


Shape = tuple[int, ...]


UnitKind = Literal["residual", "convolution"]


def greedy(input_shape: Shape, classes: int) -> nn.Module:
    """Return the mean over pixels, where there are any, and one linear layer."""
    if len(input_shape) == 3:
        return PooledLinear(input_shape[0], classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))


def dgl(input_shape: Shape, classes: int, kind: Norm, groups: int, hidden: int) -> nn.Module:
    """Return convolutions, where there are pixels, and a perceptron of `hidden` layers and one."""
    convolutions: list[nn.Module] = []
    width = math.prod(input_shape)
    if len(input_shape) == 3:
        channels, *size = input_shape
        pooled = [math.ceil(pixels / 4) for pixels in size]
        # Fewer than 2 x 2 pixels are left as they are: copies of them would teach nothing.
        final = [min(2, pixels) for pixels in pooled]
        convolutions.append(nn.AdaptiveAvgPool2d((pooled[0], pooled[1])))
        for _ in range(DGL_CONVOLUTIONS):
            convolutions += convolution(channels, channels, 1, 1, kind, groups)
        convolutions.append(nn.AdaptiveAvgPool2d((final[0], final[1])))
        width = channels * math.prod(final)
    layers = chain.from_iterable(
        (nn.Linear(width, width), norm(kind, width, groups, False), nn.ReLU())
        for _ in range(hidden)
    )
    return nn.Sequential(*convolutions, nn.Flatten(), *layers, nn.Linear(width, classes))


def one_convolution(input_shape: Shape, classes: int, kind: Norm, groups: int) -> nn.Module:
    """Return "1c2f": one convolution, where there are pixels, and two linear layers."""
    front: list[nn.Module] = [nn.Flatten()]
    width = math.prod(input_shape)
    if len(input_shape) == 3:
        width = 2 * input_shape[0]
        front = [*convolution(input_shape[0], width, 3, 2, kind, groups), *_global_mean()]
    return nn.Sequential(
        *front, nn.Linear(width, HIDDEN_WIDTH), nn.ReLU(), nn.Linear(HIDDEN_WIDTH, classes)
    )


def auglocal(
    input_shape: Shape,
    unit_shapes: Sequence[Shape],
    classes: int,
    unit: UnitKind,
    kind: Norm,
    groups: int,
) -> nn.Module:
    """Return a unit for each of the `wanted` shapes, one behind the other, then "greedy".

    Once a shape is no image the rest is flat.
    """
    units, shape = [], input_shape
    for each in unit_shapes:
        if len(shape) == len(each) == 3:
            units += _resizing_unit(shape, each, unit, kind, groups)
            shape = each
        else:
            width = shape[0] if len(shape) == 3 else math.prod(shape)
            units += _global_mean() if len(shape) == 3 else [nn.Flatten()]
            units += [nn.Linear(width, math.prod(each)), nn.ReLU()]
            shape = (math.prod(each),)
    return nn.Sequential(*units, greedy(shape, classes))


def sample_shapes(shapes: Sequence[Shape], count: int) -> list[Shape]:
    """Return `count` of the shapes that leave later layers, evenly spread, the last one included.

    With m of them, number i = 1 ... count is number ``round(m i / count)``; all, where there are
    fewer. Source: `unifSamp` of AugLocal.
    """
    if count >= len(shapes):
        return list(shapes)
    return [shapes[round(len(shapes) * i / count) - 1] for i in range(1, count + 1)]


def convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int, kind: Norm, groups: int
) -> list[nn.Module]:
    """Return a convolution, its norm and ReLU."""
    made = conv(in_channels, out_channels, kernel, stride, bias=kind == "none")
    return [made, norm(kind, out_channels, groups), nn.ReLU()]


def _global_mean() -> list[nn.Module]:
    """Return the mean over all pixels: (n, c, H, W) to (n, c)."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _resizing_unit(
    input_shape: Shape, output_shape: Shape, unit: UnitKind, kind: Norm, groups: int
) -> list[nn.Module]:
    """Return a unit between images of two shapes: by its stride, else behind a mean over pixels."""
    stride = max(1, round(input_shape[1] / output_shape[1]))
    front: list[nn.Module] = []
    if [math.ceil(pixels / stride) for pixels in input_shape[1:]] != [*output_shape[1:]]:
        front, stride = [nn.AdaptiveAvgPool2d(output_shape[1:])], 1
    if unit == "residual":
        return [
            *front,
            Residual(input_shape[0], output_shape[0], stride, kind, groups, "projection"),
        ]
    return [*front, *convolution(input_shape[0], output_shape[0], 3, stride, kind, groups)]
