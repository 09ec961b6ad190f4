"""Eight: numbers in one byte each, near the number itself at every size.

Invariant: what stands for a number is the nearest of 255 values times the largest magnitude, which
is exact itself, as is zero; so a number that has been through it comes out the same again.

::

    dynamic    sign, zeros for powers of ten, a marker, then a linear fraction in what is left
               s 0 0 1 f f f f   =   +- 10^-2 x a fraction of 16 steps between 0.1 and 1
    linear     127 steps of 1/127 each way

Source: Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor

from dtrain.syncs.parts.coded import Code


@final
class Eight(Code):
    """`kind` says which 255 values there are."""

    def __init__(self, kind: Literal["dynamic", "linear"]) -> None:
        self.kind = kind

    def size(self, count: int) -> int:
        """A byte per element, and the largest magnitude."""
        return count + 4

    def encode(self, values: Tensor, key: tuple[int | str, ...] = ()) -> Tensor:
        """Return codes and largest magnitude."""
        x = values.to(torch.float32)
        most = x.abs().max() if x.numel() else x.new_zeros(())
        unit = x / most if most > 0 else torch.zeros_like(x)
        codes = torch.bucketize(unit, borders(self.kind)).to(torch.uint8)
        return torch.cat([codes, most.view(1).view(torch.uint8)])

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return the values that codes stand for."""
        codes, most = data[:count], data[-4:].clone().view(torch.float32)
        return table(self.kind)[codes.to(torch.int32)] * most


@cache
def table(kind: Literal["dynamic", "linear"]) -> Tensor:
    """Return the 255 values, ascending, from -1 to 1."""
    if kind == "linear":
        return torch.arange(-127, 128, dtype=torch.float64).div(127).to(torch.float32)
    positive = [1.0]
    for zeros in range(7):
        steps = 1 << (6 - zeros)  # so many bits are left after sign, zeros and marker
        edges = [0.1 + 0.9 * step / steps for step in range(steps + 1)]
        mids = [(a + b) / 2 for a, b in pairwise(edges)]
        positive += [10.0**-zeros * mid for mid in mids]
    positive = sorted(positive)[-127:]
    return torch.tensor([-each for each in reversed(positive)] + [0.0, *positive])


@cache
def borders(kind: Literal["dynamic", "linear"]) -> Tensor:
    """Return where one value's numbers end and the next one's begin."""
    values = table(kind).to(torch.float64)
    return ((values[1:] + values[:-1]) / 2).to(torch.float32)
