"""Sparsemax: probabilities of which many are exactly 0, and the loss that goes with them.

Martins and Astudillo, "From softmax to sparsemax", arXiv 1602.02068. With tau chosen so that p sums
to 1, S where p > 0, and y the label::

    p = max(z - tau, 0)          tau = (sum of z over S - 1) / |S|
    L = -z_y + 1/2 sum over S of (z^2 - tau^2) + 1/2 = <p, z> - |p|^2 / 2 + 1/2 - z_y
    dL/dz = p - onehot(y)

Invariant: the loss is 0 exactly where p is the label's one-hot, and never negative.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparsemax(scores: Tensor) -> Tensor:
    """Return the probabilities (rows, classes) nearest to `scores` (algorithm 1)."""
    ordered = scores.sort(dim=1, descending=True).values
    counts = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype, device=scores.device)
    taus = (ordered.cumsum(1) - 1) / counts
    size = (ordered > taus).sum(1, keepdim=True)  # those are the first ones
    return (scores - taus.gather(1, size - 1)).clamp(min=0)


def sparsemax_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of `scores` (rows, classes) for labels (rows,).

    It is the largest value of <p, z> - |p|^2 / 2 over all p, so p need not be differentiated.
    """
    p = sparsemax(scores.detach())
    right = scores.gather(1, targets[:, None])[:, 0]
    return ((p * scores).sum(1) - p.square().sum(1) / 2 + 0.5 - right).mean()
