"""TernGrad: what crosses between nodes has two bits per number and is right in the mean.

Gradients (or, around another sync, movements of weights) are clipped to c standard deviations; then
a number is sent as -s, 0 or s, s being the largest magnitude of its tensor, so that the mean over
the draws is the number. Inside a node means are exact.

Sends between m nodes, per mean of N elements in T tensors, at most m (m - 1) (N / 4 + 5 T) bytes;
inside nodes as the inner sync. Staleness: that of the inner sync. On one node it is the inner sync.

Source: Wen et al. 2017, "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
Learning", and its code, which keeps floats on the wire; here they are packed. There is no error
feedback.

Invariant: random numbers follow from seed, tensor, update and replica alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from dtrain.rng import derive_seed as seed
from dtrain.syncs.base import require_at_least
from dtrain.syncs.common.compressed import CompressedSync
from dtrain.syncs.common.compressor import Codec, Compressor, QuantizedMean


@final
@dataclass
class TernGrad(CompressedSync):
    """Ternary transfers between nodes.

    Attributes
    ----------
    clip : float
        Standard deviations beyond which a number is clipped (c); 0 clips nothing.
    """

    clip: float = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("clip", self.clip, 0)

    def make_compressor(self, payload: str) -> Compressor:
        """Return a carrier whose draws are this replica's."""
        own = "terngrad", payload, self.block.seed, self.replicas.rank
        return QuantizedMean(TernaryCodec(self.clip), own)

    def sent_fraction(self) -> float:
        """Two bits of 32, sent once where a mean sends twice a half."""
        return 1 / 16


SHIFTS = (0, 2, 4, 6)


@final
class TernaryCodec(Codec):
    """`clip` is c; 0 clips nothing."""

    def __init__(self, clip: float) -> None:
        self.clip = clip

    def encoded_bytes(self, count: int) -> int:
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
        four = digit_table().to(packed.device).index_select(0, packed.to(torch.int32))
        return four.view(torch.int8)[:count].to(torch.float32).mul_(scale)


@cache
def digit_table() -> Tensor:
    """Return, for every byte, its four digits -1, 0 or 1 (int8), seen as one int32."""
    table = [[(byte >> shift & 3) - 1 for shift in SHIFTS] for byte in range(256)]
    return torch.tensor(table, dtype=torch.int8).view(torch.int32).view(-1)
