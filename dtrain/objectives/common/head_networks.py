"""Networks of auxiliary heads: from a block's output to class scores.

::

    greedy      mean over all pixels - linear
    dgl         (c, H, W) - mean to ceil(H/4) x ceil(W/4) - 3 x (conv 1x1 - norm - ReLU)
                          - mean to 2x2 - 3 x (linear to 4c - norm - ReLU) - linear
    1c2f        conv 3x3 to 2c channels, stride 2 - norm - ReLU - mean over all pixels
                          - linear to 128 - ReLU - linear
    auglocal    units with the output shapes of later layers - mean over all pixels - linear

Outputs that are not images are flattened. Then only the linear layers remain, in "dgl" as wide as
the output, and a unit of "auglocal" is linear and ReLU.

Sources: Belilovsky et al., arXiv 1901.08164 ("greedy"; "dgl", there "MLP-SR"). Wang et al.,
"Revisiting locally supervised learning", ICLR 2021 ("1c2f"; behind 64 channels, its last
resolution, their code keeps stride 1 and 64 channels). Ma et al., arXiv 2402.17318 ("auglocal";
their code halves the image at most once per unit, whatever it samples, and has a norm before the
last linear layer where there is one unit).

Invariant: weights are drawn from torch's generator as the caller seeded it; no network uses random
numbers in its forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Literal

from torch import nn

from dtrain.models.image_layers import Norm, PooledLinear, conv, norm
from dtrain.models.resnet import ResidualUnit

DGL_CONVOLUTIONS = 3


HIDDEN_WIDTH = 128


Shape = tuple[int, ...]


UnitKind = Literal["residual", "convolution"]


def greedy(input_shape: Shape, classes: int) -> nn.Module:
    """Return "greedy": the mean over pixels, for images, and one linear layer."""
    if len(input_shape) == 3:
        return PooledLinear(input_shape[0], classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))


def dgl(input_shape: Shape, classes: int, kind: Norm, groups: int, hidden: int) -> nn.Module:
    """Return "dgl": convolutions, for images, then `hidden` linear layers, and a last one."""
    convolutions: list[nn.Module] = []
    width = math.prod(input_shape)
    if len(input_shape) == 3:
        channels, *size = input_shape
        pooled = [math.ceil(pixels / 4) for pixels in size]
        # Fewer than 2 x 2 pixels are kept: to upsample them adds no information.
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
    """Return "1c2f": one convolution, for images, and two linear layers."""
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
    """Return "auglocal": a unit for each of `unit_shapes`, in this order, then "greedy".

    After the first shape that is not an image all units are flat.
    """
    units, shape = [], input_shape
    for unit_shape in unit_shapes:
        if len(shape) == len(unit_shape) == 3:
            units += _resizing_unit(shape, unit_shape, unit, kind, groups)
            shape = unit_shape
        else:
            width = shape[0] if len(shape) == 3 else math.prod(shape)
            units += _global_mean() if len(shape) == 3 else [nn.Flatten()]
            units += [nn.Linear(width, math.prod(unit_shape)), nn.ReLU()]
            shape = (math.prod(unit_shape),)
    return nn.Sequential(*units, greedy(shape, classes))


def sample_shapes(shapes: Sequence[Shape], count: int) -> list[Shape]:
    """Return `count` of the output shapes of later layers, evenly spread, the last one included.

    With m shapes, sample i = 1 ... count is shape ``round(m i / count)``. If m <= count all are
    returned. Source: `unifSamp` of AugLocal.
    """
    if count >= len(shapes):
        return list(shapes)
    return [shapes[round(len(shapes) * i / count) - 1] for i in range(1, count + 1)]


def convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int, kind: Norm, groups: int
) -> list[nn.Module]:
    """Return a convolution, its norm and ReLU; without a norm the convolution has a bias."""
    layer = conv(in_channels, out_channels, kernel, stride, bias=kind == "none")
    return [layer, norm(kind, out_channels, groups), nn.ReLU()]


def _global_mean() -> list[nn.Module]:
    """Return layers that average over all pixels: (rows, c, H, W) to (rows, c)."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _resizing_unit(
    input_shape: Shape, output_shape: Shape, unit: UnitKind, kind: Norm, groups: int
) -> list[nn.Module]:
    """Return a unit between images of two shapes; it resizes by its stride, or if that does not fit
    by a mean over pixels in front."""
    stride = max(1, round(input_shape[1] / output_shape[1]))
    front: list[nn.Module] = []
    if [math.ceil(pixels / stride) for pixels in input_shape[1:]] != [*output_shape[1:]]:
        front, stride = [nn.AdaptiveAvgPool2d(output_shape[1:])], 1
    if unit == "residual":
        return [
            *front,
            ResidualUnit(input_shape[0], output_shape[0], stride, kind, groups, "projection"),
        ]
    return [*front, *convolution(input_shape[0], output_shape[0], 3, stride, kind, groups)]
