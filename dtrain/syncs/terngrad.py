"""TernGrad: unbiased ternary quantization of transfers between nodes, two bits per number.

Gradients (or, around another sync, deltas of weights) are clipped to c standard deviations. Then a
number x is sent as -s, 0 or s, where s is the largest magnitude of its tensor::

    P(sign(x) s) = |x| / s,  else 0        so the expectation is x

Means inside a node are exact.

Sends between m nodes, per mean of N elements in T tensors, at most m (m - 1) (N / 4 + 5 T) bytes;
inside nodes what the inner sync does. Staleness: that of the inner sync. On one node it is the
inner sync.

Source: Wen et al. 2017, "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
Learning", and its code, which sends floats; here four numbers are packed into a byte. There is no
error feedback.

Invariant: random numbers follow from seed, tensor, update and replica alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from dtrain.rng import derive_seed
from dtrain.syncs.base import require_at_least
from dtrain.syncs.common.compressed import CompressedSync
from dtrain.syncs.common.compressor import Codec, Compressor, QuantizedMean

BIT_SHIFTS = (0, 2, 4, 6)
"""The places of four numbers in a byte."""


@final
@dataclass
class TernGrad(CompressedSync):
    """Ternary transfers between nodes.

    Attributes
    ----------
    clip : float
        Standard deviations beyond which a number is clipped (c); 0: no clipping.
    """

    clip: float = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("clip", self.clip, 0)

    def make_compressor(self, payload: str) -> Compressor:
        """Return a compressor with random numbers of this replica's own."""
        rng_key = "terngrad", payload, self.block.seed, self.replicas.rank
        return QuantizedMean(TernaryCodec(self.clip), rng_key)

    def sent_fraction(self) -> float:
        """Return 2 bits of 32."""
        return 1 / 16


@final
class TernaryCodec(Codec):
    """Four numbers per byte, and the largest magnitude in float32.

    Parameters
    ----------
    clip : float
        Standard deviations beyond which a number is clipped; 0: no clipping.
    """

    def __init__(self, clip: float) -> None:
        self.clip = clip

    def encoded_bytes(self, count: int) -> int:
        """Return a quarter of a byte per element, and four of the largest magnitude."""
        return -(-count // 4) + 4

    def encode(self, values: Tensor, key: tuple[int | str, ...]) -> Tensor:
        """Return the packed digits, followed by the largest magnitude."""
        x = values.to(torch.float32)
        if self.clip and x.numel() > 1:
            limit = self.clip * float(x.std(correction=0))
            x = x.clamp(-limit, limit)
        magnitude = x.abs()
        scale = magnitude.max() if x.numel() else x.new_zeros(())
        generator = torch.Generator(x.device).manual_seed(derive_seed(*key))
        threshold = torch.rand(x.shape, generator=generator, device=x.device).mul_(scale)
        digits = threshold.lt(magnitude).to(torch.int8) * x.sign().to(torch.int8)
        quads = pad((digits + 1).to(torch.uint8), (0, -len(digits) % 4)).view(-1, 4)
        packed = quads[:, 0].clone()
        for column, shift in enumerate(BIT_SHIFTS[1:], 1):
            packed |= quads[:, column] << shift
        return torch.cat([packed, scale.view(1).view(torch.uint8)])

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return -s, 0 and s for the packed digits."""
        packed, scale = data[:-4], data[-4:].clone().view(torch.float32)
        quads = digit_table().to(packed.device).index_select(0, packed.to(torch.int32))
        return quads.view(torch.int8)[:count].to(torch.float32).mul_(scale)


@cache
def digit_table() -> Tensor:
    """Return the four digits -1, 0 or 1 (int8) of every byte, as one int32 each: (256,)."""
    table = [[(byte >> shift & 3) - 1 for shift in BIT_SHIFTS] for byte in range(256)]
    return torch.tensor(table, dtype=torch.int8).view(torch.int32).view(-1)
