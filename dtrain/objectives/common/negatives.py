"""Negatives: labels that are wrong, and samples that are mixed.

Invariant: what is drawn belongs to the sample's row in the whole update, on the CPU.

::

    label 2 of 5   random   0 1 . 3 4   each 1/4        hard   in proportion to p, without p_2
    mixed          mask * x + (1 - mask) * (next x)     mask: random bits, blurred, cut at 1/2
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dtrain.block.micro_batch import MicroBatch

BLUR_STEPS = 6
"""How often masks are smoothed; Hinton's paper does not say."""


EPS = 1e-12
"""Added to probabilities, so that something is left where the probe is sure."""


def random_labels(micro_batch: MicroBatch, classes: int) -> Tensor:
    """Return (rows,) labels that are wrong, all being as likely."""
    shift = micro_batch.row_random.generate(
        "wrong", lambda n, g: torch.randint(1, classes, (n,), generator=g)
    )
    return (micro_batch.targets + shift.to(micro_batch.targets)) % classes


def hard_labels(micro_batch: MicroBatch, scores: Tensor) -> Tensor:
    """Return (rows,) labels that are wrong, drawn by the softmax of `scores` (rows, C)."""
    drawn = micro_batch.row_random.generate("wrong", lambda n, g: torch.rand(n, generator=g))
    chances = scores.double().softmax(1) + EPS
    sums = chances.scatter(1, micro_batch.targets[:, None], 0.0).cumsum(1)
    return (drawn.to(sums)[:, None] * sums[:, -1:] >= sums).sum(1)


def mixed_samples(micro_batch: MicroBatch, sample: Tensor) -> Tensor:
    """Return (rows, ...) each sample mixed with the next of its micro-batch by a smooth mask; the
    channels of an image have one mask."""
    shape = (1, *sample.shape[2:]) if sample.dim() == 4 else tuple(sample.shape[1:])
    mask = micro_batch.row_random.generate("mask", lambda n, g: _masks(n, shape, g)).to(sample)
    return mask * sample + (1 - mask) * sample.roll(-1, 0)


def _masks(rows: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Return (rows, *shape) of zeros and ones that hang together."""
    made = (torch.rand(rows, *shape, generator=generator) < 0.5).double()
    for _ in range(BLUR_STEPS):
        for dim in range(1, made.dim()):
            made = blur(made, dim)
    return (made > 0.5).double()


def blur(mask: Tensor, dim: int) -> Tensor:
    """Return [1/4, 1/2, 1/4] of neighbours along a dimension; a border is its own neighbour."""
    size = mask.shape[dim]
    before = mask.index_select(dim, torch.arange(-1, size - 1).clamp(min=0))
    after = mask.index_select(dim, torch.arange(1, size + 1).clamp(max=size - 1))
    return before / 4 + mask / 2 + after / 4
