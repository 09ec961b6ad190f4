"""Int8: 8-bit quantization of transfers between nodes.

Gradients (or, around another sync, deltas of weights) are divided by the largest magnitude of their
tensor and rounded to the nearest of 255 values. Means inside a node are exact.

Sends between m nodes, per mean of N elements, 2 (m - 1) N bytes and 4 for every part of a tensor.
Two nodes exchange everything; on more nodes each adds up a slice, and encodes the sum again. Inside
nodes it sends what the inner sync does. Staleness: that of the inner sync. On one node it is the
inner sync.

Source: Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561.

Invariant: each encoding changes a number by at most half the distance of two values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from dtrain.comm.int8_codec import QuantizationKind, dequantize, max_abs, quantize
from dtrain.syncs.common.compressed import CompressedSync
from dtrain.syncs.common.compressor import Codec, Compressor, QuantizedMean


@final
@dataclass
class Int8(CompressedSync):
    """One byte per number between nodes.

    Attributes
    ----------
    values : "dynamic" or "linear"
        The 255 values: closer together near zero (over seven powers of ten), or evenly spaced.
    """

    values: QuantizationKind = "dynamic"

    def make_compressor(self, payload: str) -> Compressor:
        """Return a compressor without random numbers."""
        return QuantizedMean(Int8Codec(self.values), ())

    def sent_fraction(self) -> float:
        """Return 8 bits of 32."""
        return 1 / 4


@final
class Int8Codec(Codec):
    """A byte per number, which selects one of 255 values, and the largest magnitude in float32."""

    can_reencode: ClassVar[bool] = True

    def __init__(self, kind: QuantizationKind) -> None:
        self.kind = kind

    def encoded_bytes(self, count: int) -> int:
        """Return a byte per element, and four of the largest magnitude."""
        return count + 4

    def encode(self, values: Tensor, key: tuple[int | str, ...] = ()) -> Tensor:
        """Return the codes, followed by the largest magnitude."""
        x = values.to(torch.float32)
        scale = max_abs(x) if x.numel() else x.new_zeros(())
        codes = quantize(x / scale if scale > 0 else torch.zeros_like(x), self.kind)
        return torch.cat([codes, scale.view(1).view(torch.uint8)])

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return the values that the codes select, times the largest magnitude."""
        scale = data[-4:].clone().view(torch.float32)
        return dequantize(data[:count], self.kind, scale)
