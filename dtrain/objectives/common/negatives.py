"""Negative samples of forward-forward: wrong labels and mixed samples.

::

    label 2 of 5   random   0 1 . 3 4   each 1/4        hard   in proportion to p, without p_2
    mixed          mask * x + (1 - mask) * (next x)     mask: random bits, blurred, cut at 1/2

Invariant: random numbers belong to the sample's row in the whole update and are drawn on the CPU,
so they do not depend on the cut into micro-batches and replicas.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dtrain.block.micro_batch import MicroBatch

BLUR_STEPS = 6
"""Number of times that masks are smoothed; Hinton's paper does not give it."""


EPS = 1e-12
"""Added to probabilities, so that a wrong label can be drawn where the probe is certain."""


def random_labels(micro_batch: MicroBatch, classes: int) -> Tensor:
    """Return wrong labels (rows,), all equally likely."""
    shift = micro_batch.row_random.generate(
        "wrong", lambda n, g: torch.randint(1, classes, (n,), generator=g)
    )
    return (micro_batch.targets + shift.to(micro_batch.targets)) % classes


def hard_labels(micro_batch: MicroBatch, scores: Tensor) -> Tensor:
    """Return wrong labels (rows,), drawn in proportion to the softmax of `scores` (rows, C)."""
    uniform = micro_batch.row_random.generate("wrong", lambda n, g: torch.rand(n, generator=g))
    probabilities = scores.double().softmax(1) + EPS
    cumulative = probabilities.scatter(1, micro_batch.targets[:, None], 0.0).cumsum(1)
    return (uniform.to(cumulative)[:, None] * cumulative[:, -1:] >= cumulative).sum(1)


def mixed_samples(micro_batch: MicroBatch, samples: Tensor) -> Tensor:
    """Return samples (rows, ...), each mixed with the next of its micro-batch by a smooth mask; all
    channels of an image share one mask."""
    shape = (1, *samples.shape[2:]) if samples.dim() == 4 else tuple(samples.shape[1:])
    mask = micro_batch.row_random.generate("mask", lambda n, g: _masks(n, shape, g)).to(samples)
    return mask * samples + (1 - mask) * samples.roll(-1, 0)


def _masks(rows: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Return masks (rows, *shape) of zeros and ones in coherent patches."""
    masks = (torch.rand(rows, *shape, generator=generator) < 0.5).double()
    for _ in range(BLUR_STEPS):
        for dim in range(1, masks.dim()):
            masks = blur(masks, dim)
    return (masks > 0.5).double()


def blur(mask: Tensor, dim: int) -> Tensor:
    """Convolve with [1/4, 1/2, 1/4] along a dimension; border values are repeated."""
    size = mask.shape[dim]
    before = mask.index_select(dim, torch.arange(-1, size - 1).clamp(min=0))
    after = mask.index_select(dim, torch.arange(1, size + 1).clamp(max=size - 1))
    return before / 4 + mask / 2 + after / 4
