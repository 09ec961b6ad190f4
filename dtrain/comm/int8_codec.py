"""Quantisation to 8 bits: one byte per number, accurate at every magnitude ("dynamic") or linear.

Invariant: a number becomes the nearest of 255 values times the largest magnitude. That magnitude
and zero are exact, so quantising a second time changes nothing.

::

    dynamic    sign, zeros for powers of ten, a marker, then a linear fraction in the remaining bits
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
"""Elements that are converted at once, so that intermediate results stay in the cache."""


def max_abs(x: Tensor) -> Tensor:
    """Return the largest magnitude, 0-dim; NaN where one is."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)


def quantize(values: Tensor, kind: QuantizationKind) -> Tensor:
    """Return the codes (uint8) of the nearest values of numbers in -1 ... 1, 1-D float32.

    The upper half of a number's bits decides all but one comparison: at most one boundary lies
    between two numbers that share it.
    """
    low, boundary = (table.to(values.device) for table in lookup_table(kind))
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for part, out in zip(
        torch.split(values, CHUNK_ELEMENTS), torch.split(codes, CHUNK_ELEMENTS), strict=True
    ):
        upper = (part.view(torch.int32) >> 16) & 0xFFFF
        torch.add(low.index_select(0, upper), part > boundary.index_select(0, upper), out=out)
    return codes


def dequantize(codes: Tensor, kind: QuantizationKind, scale: Tensor | float = 1.0) -> Tensor:
    """Return the values (1-D float32) of codes, times `scale`, one number."""
    table = code_values(kind).to(codes.device) * scale
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for part, out in zip(
        torch.split(codes, CHUNK_ELEMENTS), torch.split(values, CHUNK_ELEMENTS), strict=True
    ):
        torch.index_select(table, 0, part.to(torch.int32), out=out)
    return values


@cache
def code_values(kind: QuantizationKind) -> Tensor:
    """Return the 255 values, ascending, from -1 to 1."""
    if kind == "linear":
        return torch.arange(-127, 128, dtype=torch.float64).div(127).to(torch.float32)
    positive = [1.0]
    for zeros in range(7):
        steps = 1 << (6 - zeros)  # 6 - zeros bits remain after sign, zeros and marker
        edges = [0.1 + 0.9 * step / steps for step in range(steps + 1)]
        mids = [(a + b) / 2 for a, b in pairwise(edges)]
        positive += [10.0**-zeros * mid for mid in mids]
    positive = sorted(positive)[-127:]
    return torch.tensor([-value for value in reversed(positive)] + [0.0, *positive])


@cache
def boundaries(kind: QuantizationKind) -> Tensor:
    """Return the numbers halfway between neighbouring values."""
    values = code_values(kind).to(torch.float64)
    return ((values[1:] + values[:-1]) / 2).to(torch.float32)


@cache
def lookup_table(kind: QuantizationKind) -> tuple[Tensor, Tensor]:
    """Return two tables over all upper halves of a float32, for the numbers in -1 ... 1 with it:
    the lowest code (uint8), and the boundary above which the next code begins."""
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32).nan_to_num(0)
    codes = torch.bucketize(ends, boundaries(kind))
    low, high = codes.aminmax(dim=0)
    boundary = boundaries(kind)[low.clamp(max=len(boundaries(kind)) - 1)]
    return low.to(torch.uint8), torch.where(high > low, boundary, torch.inf)
