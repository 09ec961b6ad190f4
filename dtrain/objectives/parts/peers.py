"""Peer normalisation: units are pulled towards the mean activity of their block.

With a_i the mean activity of unit i (channel i of an image) over the positives of an update and
r <- m r + (1 - m) a its running mean, m = 0.9, the code of loeweX/Forward-Forward adds
c * mean_i (mean(r) - r_i)^2 to the loss, so the force on a_i is

    c (1 - m) 2/d (r_i - mean(r))

*Here r is that of the segment's begin*, where the code has this micro-batch in it: a force that
does not depend on the other samples, and on which replicas agree without a message. In the first
segment it is 0, since all r_i begin at 1/2. r itself is that of the code, over the positives of all
replicas, and is brought up to date at the segment's end.

Invariant: ``decay * mean + recent`` is the running mean after the last update of a segment;
`recent` adds up over samples and replicas.

::

    B   recent += (1 - m) / m * sum a / n     U   recent *= m, decay *= m
    segment's end   recent summed over replicas, mean = decay * mean + recent
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

MOMENTUM = 0.9


@final
class Peers(nn.Module):
    """Running mean activities of the units of a block whose samples have `shape`; no forward."""

    alike = ("mean", "recent", "decay")
    mean: Tensor
    recent: Tensor
    decay: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        units = shape[0] if len(shape) == 3 else math.prod(shape)
        self.register_buffer("mean", torch.full((units,), 0.5))
        self.register_buffer("recent", torch.zeros(units))
        self.register_buffer("decay", torch.ones(()))

    def seen(self, out: Tensor, rows: int) -> None:
        """Add the activity of positives (n, ...), of `rows` in the whole update."""
        activity = out.detach().view(len(out), len(self.mean), -1).mean(2).sum(0)
        self.recent.add_(activity.to(self.recent), alpha=(1 - MOMENTUM) / MOMENTUM / rows)

    def force(self, out: Tensor) -> Tensor:
        """Return d(penalty)/d(out) for positives (n, ...), for a mean over n and coefficient 1."""
        units, numbers = len(self.mean), math.prod(out.shape[1:])
        gap = 2 * (1 - MOMENTUM) / units * (self.mean - self.mean.mean())
        spread = gap.repeat_interleave(numbers // units) * (units / numbers / len(out))
        return spread.view(1, *out.shape[1:]).expand_as(out).to(out.dtype)

    def aged(self) -> None:
        """Follow an update."""
        self.recent.mul_(MOMENTUM)
        self.decay.mul_(MOMENTUM)

    def settled(self) -> None:
        """End a segment."""
        self.mean.mul_(self.decay).add_(self.recent)
        self.recent.zero_()
        self.decay.fill_(1.0)
