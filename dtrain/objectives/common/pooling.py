"""A block's output as one row of numbers per sample, images averaged down to so many at most.

Invariant: what is not larger than the limit enters a head number by number; nothing here learns.

::

    (c, H, W)  --mean over a grid-->  (c, h, w)  -->  c h w numbers     h, w <= sqrt(limit / c)
    (d,)       ------------------------------------>  d numbers         whatever the limit
"""

from __future__ import annotations

import math

from torch import nn

from dtrain.errors import ConfigError


def pooled_size(shape: tuple[int, ...], limit: int) -> tuple[int, int] | None:
    """Return the pixels (h, w) that an output of `shape` is averaged to, None where it stays.

    The largest square of which c * h * w numbers are no more than `limit`, but at least one pixel;
    an image that is lower or narrower than the square keeps that side.
    """
    if len(shape) != 3 or math.prod(shape) <= limit:
        return None
    channels, height, width = shape
    side = max(1, math.isqrt(limit // channels))
    return min(side, height), min(side, width)


def width(shape: tuple[int, ...], limit: int) -> int:
    """Return how many numbers of a sample are left."""
    size = pooled_size(shape, limit)
    return math.prod(shape) if size is None else shape[0] * math.prod(size)


def make_pool(shape: tuple[int, ...], limit: int) -> nn.Module:
    """Return a module from an output (rows, ...) to (rows, width)."""
    size = pooled_size(shape, limit)
    return nn.Flatten() if size is None else nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten())


def check_limit(limit: int) -> None:
    """Refuse a limit that leaves nothing."""
    if limit < 1:
        raise ConfigError(
            "todo.key", f"[objective] features = {limit}: give at least 1 number per sample"
        )
