"""Decoders: what a block's features still tell of the sample that entered the net.

::

    (c, h, w) - bilinear to H x W - conv 3x3 to 12 - norm - ReLU - conv 3x3 to C     (C, H, W)
    flat      - linear                                                               any sample

    range of the data known     cross-entropy of each value with the sample in 0 ... 1, as it was
                                before it was standardised, augmented as the input was
    unknown                     mean squared difference from the standardised sample

Invariant: a loss is a mean over all values of a sample, and over samples. The sigmoid stands in
the loss, where it cannot overflow.

Source: Wang et al., "Revisiting locally supervised learning", ICLR 2021 (there for images of bytes,
with corners aligned in the upsampling).
"""

from __future__ import annotations

import math
from typing import final

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, mse_loss

from dtrain.live import Live
from dtrain.models.images import Norm, conv, inner, norm

CHANNELS = 12


@final
class Decoder(nn.Module):
    """Images of features to images like the data's."""

    draws = False

    def __init__(self, channels: int, sample: tuple[int, ...], kind: Norm, groups: int) -> None:
        super().__init__()
        self.size = sample[1:]
        self.conv1 = conv(channels, CHANNELS, 3, bias=True)
        # As many groups as 12 channels have of those that are asked for.
        self.norm = norm(kind, CHANNELS, math.gcd(CHANNELS, groups))
        self.conv2 = conv(CHANNELS, sample[0], 3, bias=True)

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, C, H, W), not yet squeezed into 0 ... 1."""
        large = interpolate(inner(input), self.size, mode="bilinear", align_corners=True)
        made: Tensor = self.conv2(self.norm(self.conv1(large)).relu())
        return made


def decoder(
    features: tuple[int, ...], sample: tuple[int, ...], kind: Norm, groups: int
) -> nn.Module:
    """Return what makes samples of shape `sample` of features (one sample's shape)."""
    if len(features) == len(sample) == 3:
        return Decoder(features[0], sample, kind, groups)
    linear = nn.Linear(math.prod(features), math.prod(sample))
    return nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, sample))


def reconstruction(decoder: nn.Module, features: Tensor, live: Live) -> Tensor:
    """Return the mean loss of what the decoder makes of features (rows, ...)."""
    made: Tensor = decoder(features)
    if live.image is not None:
        return binary_cross_entropy_with_logits(made, live.image.to(made.dtype))
    assert live.sample is not None
    return mse_loss(made, live.sample.to(made.dtype))
