"""Ternary: numbers as -s, 0 or s, four to a byte, right in the mean.

Invariant: every code stands for a number whose mean, over the random draws, is the clipped one.

::

    s = max |x|, after clipping to c standard deviations         2 bits each: 0, 1, 2 for -s, 0, s
    q = sign(x) s with probability |x| / s, else 0               then s, in 4 bytes

Source: Wen et al. 2017, "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
Learning", and its code: the deviation is around the mean, clipping about zero.
"""

from __future__ import annotations

from functools import cache
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from dtrain.seeds import key as seed
from dtrain.syncs.parts.coded import Code

SHIFTS = (0, 2, 4, 6)


@final
class Ternary(Code):
    """`clip` is c; 0 clips nothing."""

    def __init__(self, clip: float) -> None:
        self.clip = clip

    def size(self, count: int) -> int:
        """A quarter of a byte per element, and the scale."""
        return -(-count // 4) + 4

    def encode(self, values: Tensor, key: tuple[int | str, ...]) -> Tensor:
        """Return codes and scale."""
        x = values.to(torch.float32)
        if self.clip and x.numel() > 1:
            limit = self.clip * float(x.std(correction=0))
            x = x.clamp(-limit, limit)
        size = x.abs()
        scale = size.max() if x.numel() else x.new_zeros(())
        drawn = torch.rand(x.shape, generator=torch.Generator(x.device).manual_seed(seed(*key)))
        code = drawn.mul_(scale).lt(size).to(torch.int8) * x.sign().to(torch.int8)
        quads = pad((code + 1).to(torch.uint8), (0, -len(code) % 4)).view(-1, 4)
        packed = quads[:, 0].clone()
        for place, shift in enumerate(SHIFTS[1:], 1):
            packed |= quads[:, place] << shift
        return torch.cat([packed, scale.view(1).view(torch.uint8)])

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return -s, 0 and s."""
        packed, scale = data[:-4], data[-4:].clone().view(torch.float32)
        four = digits().to(packed.device).index_select(0, packed.to(torch.int32))
        return four.view(torch.int8)[:count].to(torch.float32).mul_(scale)


@cache
def digits() -> Tensor:
    """Return, for every byte, its four digits -1, 0 or 1 (int8), seen as one int32."""
    table = [[(byte >> shift & 3) - 1 for shift in SHIFTS] for byte in range(256)]
    return torch.tensor(table, dtype=torch.int8).view(torch.int32).view(-1)
