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
from typing import Literal

import torch
from torch import Tensor

QuantizationKind = Literal["dynamic", "linear"]


CHUNK_ELEMENTS = 1 << 16
"""Elements at once: what is made in between stays in the cache."""


def max_abs(x: Tensor) -> Tensor:
    """Return the largest magnitude, 0-dim; NaN where one is."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)


def quantize(values: Tensor, kind: QuantizationKind) -> Tensor:
    """Return the codes (uint8) of the nearest values of numbers in -1 ... 1, 1-D float32.

    The upper half of a number's bits tells all but one comparison: between two numbers that share
    it lies one border at most.
    """
    low, border = (each.to(values.device) for each in lookup_table(kind))
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for part, out in zip(
        torch.split(values, CHUNK_ELEMENTS), torch.split(codes, CHUNK_ELEMENTS), strict=True
    ):
        cell = (part.view(torch.int32) >> 16) & 0xFFFF
        torch.add(low.index_select(0, cell), part > border.index_select(0, cell), out=out)
    return codes


def dequantize(codes: Tensor, kind: QuantizationKind, scale: Tensor | float = 1.0) -> Tensor:
    """Return the values (float32) that codes (1-D) stand for, times `most`, one number."""
    values = code_values(kind).to(codes.device) * scale
    found = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for part, out in zip(
        torch.split(codes, CHUNK_ELEMENTS), torch.split(found, CHUNK_ELEMENTS), strict=True
    ):
        torch.index_select(values, 0, part.to(torch.int32), out=out)
    return found


@cache
def code_values(kind: QuantizationKind) -> Tensor:
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
def boundaries(kind: QuantizationKind) -> Tensor:
    """Return where one value's numbers end and the next one's begin."""
    values = code_values(kind).to(torch.float64)
    return ((values[1:] + values[:-1]) / 2).to(torch.float32)


@cache
def lookup_table(kind: QuantizationKind) -> tuple[Tensor, Tensor]:
    """Return, for all upper halves of a float32, the lowest code (uint8) of numbers in -1 ... 1
    that begin with it, and above which number the next code begins."""
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32).nan_to_num(0)
    codes = torch.bucketize(ends, boundaries(kind))
    low, high = codes.aminmax(dim=0)
    border = boundaries(kind)[low.clamp(max=len(boundaries(kind)) - 1)]
    return low.to(torch.uint8), torch.where(high > low, border, torch.inf)
