"""Int8: what crosses between nodes has one byte per number.

Gradients (or, around another sync, movements of weights) are divided by the largest magnitude of
their tensor and sent as the nearest of 255 values. Inside a node means are exact.

Sends between m nodes, per mean of N elements, 2 (m - 1) N bytes and 4 for every part of a tensor:
two nodes tell each other all; more of them each add up a slice, and code the sum again.
Inside nodes as the inner sync. Staleness: that of the inner sync. On one node it is the inner sync.

Source: Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561.

Invariant: each coding moves a number by at most half the distance of two values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from dtrain.comm.quantize import QuantizationKind, dequantize, max_abs, quantize
from dtrain.syncs.common.compressed import CompressedSync
from dtrain.syncs.common.compressor import Codec, Compressor, QuantizedMean


@final
class Int8Codec(Codec):
    """`kind` says which 255 values there are."""

    can_reencode: ClassVar[bool] = True

    def __init__(self, kind: QuantizationKind) -> None:
        self.kind = kind

    def encoded_bytes(self, count: int) -> int:
        """A byte per element, and the largest magnitude."""
        return count + 4

    def encode(self, values: Tensor, key: tuple[int | str, ...] = ()) -> Tensor:
        """Return codes and largest magnitude."""
        x = values.to(torch.float32)
        most = max_abs(x) if x.numel() else x.new_zeros(())
        codes = quantize(x / most if most > 0 else torch.zeros_like(x), self.kind)
        return torch.cat([codes, most.view(1).view(torch.uint8)])

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return the values that codes stand for."""
        most = data[-4:].clone().view(torch.float32)
        return dequantize(data[:count], self.kind, most)


@final
@dataclass
class Int8(CompressedSync):
    """Transfers of a byte per number between nodes.

    Attributes
    ----------
    values : "dynamic" or "linear"
        Which values there are: near together at zero (seven powers of ten), or evenly.
    """

    values: QuantizationKind = "dynamic"

    def make_compressor(self, payload: str) -> Compressor:
        """Return a carrier; nothing in it is random."""
        return QuantizedMean(Int8Codec(self.values), ())

    def sent_fraction(self) -> float:
        """Eight bits of 32, sent once where a mean sends twice a half."""
        return 1 / 4
