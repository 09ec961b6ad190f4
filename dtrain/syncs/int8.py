"""Int8: what crosses between nodes has one byte per number.

Gradients (or, around another sync, movements of weights) are divided by the largest magnitude of
their tensor and sent as the nearest of 255 values. Inside a node means are exact.

Sends between m nodes, per mean of N elements in T tensors, m (m - 1) (N + 4 T) bytes; inside nodes
as the inner sync. Staleness: that of the inner sync. On one node it is the inner sync.

Source: Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561.

Invariant: the error of a number is at most half the distance of two values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from dtrain.syncs.parts.carrier import Carrier
from dtrain.syncs.parts.coded import Coded
from dtrain.syncs.parts.eight import Eight
from dtrain.syncs.parts.smaller import Smaller


@final
@dataclass
class Int8(Smaller):
    """Transfers of a byte per number between nodes.

    Attributes
    ----------
    values : "dynamic" or "linear"
        Which values there are: near together at zero (seven powers of ten), or evenly.
    """

    values: Literal["dynamic", "linear"] = "dynamic"

    def carries(self, what: str) -> Carrier:
        """Return a carrier; nothing in it is random."""
        return Coded(Eight(self.values), ())

    def share(self) -> float:
        """Eight bits of 32, sent once where a mean sends twice a half."""
        return 1 / 4
