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

from dtrain.models.images import Norm, Pooled, conv, norm
from dtrain.models.resnet import Unit as Residual

CONVOLUTIONS = 3
HIDDEN = 128

Shape = tuple[int, ...]
Unit = Literal["residual", "convolution"]


def greedy(outputs: Shape, classes: int) -> nn.Module:
    """Return the mean over pixels, where there are any, and one linear layer."""
    if len(outputs) == 3:
        return Pooled(outputs[0], classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(outputs), classes))


def dgl(outputs: Shape, classes: int, kind: Norm, groups: int, hidden: int) -> nn.Module:
    """Return convolutions, where there are pixels, and a perceptron of `hidden` layers and one."""
    convolutions: list[nn.Module] = []
    width = math.prod(outputs)
    if len(outputs) == 3:
        channels, *size = outputs
        pooled = [math.ceil(pixels / 4) for pixels in size]
        # Fewer than 2 x 2 pixels are left as they are: copies of them would teach nothing.
        final = [min(2, pixels) for pixels in pooled]
        convolutions.append(nn.AdaptiveAvgPool2d((pooled[0], pooled[1])))
        for _ in range(CONVOLUTIONS):
            convolutions += convolution(channels, channels, 1, 1, kind, groups)
        convolutions.append(nn.AdaptiveAvgPool2d((final[0], final[1])))
        width = channels * math.prod(final)
    layers = chain.from_iterable(
        (nn.Linear(width, width), norm(kind, width, groups, False), nn.ReLU())
        for _ in range(hidden)
    )
    return nn.Sequential(*convolutions, nn.Flatten(), *layers, nn.Linear(width, classes))


def one_convolution(outputs: Shape, classes: int, kind: Norm, groups: int) -> nn.Module:
    """Return "1c2f": one convolution, where there are pixels, and two linear layers."""
    front: list[nn.Module] = [nn.Flatten()]
    width = math.prod(outputs)
    if len(outputs) == 3:
        width = 2 * outputs[0]
        front = [*convolution(outputs[0], width, 3, 2, kind, groups), *_mean()]
    return nn.Sequential(*front, nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))


def auglocal(
    outputs: Shape, wanted: Sequence[Shape], classes: int, unit: Unit, kind: Norm, groups: int
) -> nn.Module:
    """Return a unit for each of the `wanted` shapes, one behind the other, then "greedy".

    Once a shape is no image the rest is flat.
    """
    units, shape = [], outputs
    for each in wanted:
        if len(shape) == len(each) == 3:
            units += _resized(shape, each, unit, kind, groups)
            shape = each
        else:
            width = shape[0] if len(shape) == 3 else math.prod(shape)
            units += _mean() if len(shape) == 3 else [nn.Flatten()]
            units += [nn.Linear(width, math.prod(each)), nn.ReLU()]
            shape = (math.prod(each),)
    return nn.Sequential(*units, greedy(shape, classes))


def sampled(later: Sequence[Shape], count: int) -> list[Shape]:
    """Return `count` of the shapes that leave later layers, evenly spread, the last one included.

    With m of them, number i = 1 ... count is number ``round(m i / count)``; all, where there are
    fewer. Source: `unifSamp` of AugLocal.
    """
    if count >= len(later):
        return list(later)
    return [later[round(len(later) * i / count) - 1] for i in range(1, count + 1)]


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int, kind: Norm, groups: int
) -> list[nn.Module]:
    """Return a convolution, its norm and ReLU."""
    made = conv(inputs, outputs, kernel, stride, bias=kind == "none")
    return [made, norm(kind, outputs, groups), nn.ReLU()]


def _mean() -> list[nn.Module]:
    """Return the mean over all pixels: (n, c, H, W) to (n, c)."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _resized(inputs: Shape, outputs: Shape, unit: Unit, kind: Norm, groups: int) -> list[nn.Module]:
    """Return a unit between images of two shapes: by its stride, else behind a mean over pixels."""
    stride = max(1, round(inputs[1] / outputs[1]))
    front: list[nn.Module] = []
    if [math.ceil(pixels / stride) for pixels in inputs[1:]] != [*outputs[1:]]:
        front, stride = [nn.AdaptiveAvgPool2d(outputs[1:])], 1
    if unit == "residual":
        return [*front, Residual(inputs[0], outputs[0], stride, kind, groups, "projection")]
    return [*front, *convolution(inputs[0], outputs[0], 3, stride, kind, groups)]
