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

from dtrain.eight import Kind, decoded, encoded, magnitude
from dtrain.syncs.parts.carrier import Carrier
from dtrain.syncs.parts.coded import Code, Coded
from dtrain.syncs.parts.smaller import Smaller


@final
class Eight(Code):
    """`kind` says which 255 values there are."""

    again: ClassVar[bool] = True

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def size(self, count: int) -> int:
        """A byte per element, and the largest magnitude."""
        return count + 4

    def encode(self, values: Tensor, key: tuple[int | str, ...] = ()) -> Tensor:
        """Return codes and largest magnitude."""
        x = values.to(torch.float32)
        most = magnitude(x) if x.numel() else x.new_zeros(())
        codes = encoded(x / most if most > 0 else torch.zeros_like(x), self.kind)
        return torch.cat([codes, most.view(1).view(torch.uint8)])

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return the values that codes stand for."""
        most = data[-4:].clone().view(torch.float32)
        return decoded(data[:count], self.kind, most)


@final
@dataclass
class Int8(Smaller):
    """Transfers of a byte per number between nodes.

    Attributes
    ----------
    values : "dynamic" or "linear"
        Which values there are: near together at zero (seven powers of ten), or evenly.
    """

    values: Kind = "dynamic"

    def carries(self, what: str) -> Carrier:
        """Return a carrier; nothing in it is random."""
        return Coded(Eight(self.values), ())

    def share(self) -> float:
        """Eight bits of 32, sent once where a mean sends twice a half."""
        return 1 / 4
