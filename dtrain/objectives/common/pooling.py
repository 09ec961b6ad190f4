"""Flattening of a block's output; images are averaged down to a limit of features.

::

    (c, H, W)  --mean over a grid-->  (c, h, w)  -->  c h w features     h, w <= sqrt(limit / c)
    (d,)       ------------------------------------>  d features         whatever the limit

Invariant: an output that is not larger than the limit is only flattened; nothing here is trained.
"""

from __future__ import annotations

import math

from torch import nn

from dtrain.errors import ConfigError


def pooled_size(shape: tuple[int, ...], limit: int) -> tuple[int, int] | None:
    """Return the pixels (h, w) to which an output of `shape` is averaged, or None for no pooling.

    It is the largest square with c * h * w <= `limit`, but at least one pixel. An image with fewer
    rows or columns than the square keeps that side.
    """
    if len(shape) != 3 or math.prod(shape) <= limit:
        return None
    channels, height, width = shape
    side = max(1, math.isqrt(limit // channels))
    return min(side, height), min(side, width)


def width(shape: tuple[int, ...], limit: int) -> int:
    """Return the number of features per sample after pooling."""
    size = pooled_size(shape, limit)
    return math.prod(shape) if size is None else shape[0] * math.prod(size)


def make_pool(shape: tuple[int, ...], limit: int) -> nn.Module:
    """Return a module from an output (rows, *shape) to features (rows, width)."""
    size = pooled_size(shape, limit)
    return nn.Flatten() if size is None else nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten())


def check_limit(limit: int) -> None:
    """Reject a limit below 1 feature."""
    if limit < 1:
        raise ConfigError(
            "objective.features-too-small", f"[objective] features = {limit} must be at least 1"
        )
