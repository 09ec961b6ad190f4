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
from typing import final

from dtrain.syncs.parts.carrier import Carrier
from dtrain.syncs.parts.coded import Coded
from dtrain.syncs.parts.smaller import Smaller
from dtrain.syncs.parts.ternary import Ternary
from dtrain.syncs.sync import least


@final
@dataclass
class TernGrad(Smaller):
    """Ternary transfers between nodes.

    Attributes
    ----------
    clip : float
        Standard deviations beyond which a number is clipped (c); 0 clips nothing.
    """

    clip: float = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        least("clip", self.clip, 0)

    def carries(self, what: str) -> Carrier:
        """Return a carrier whose draws are this replica's."""
        own = "terngrad", what, self.block.seed, self.replicas.rank
        return Coded(Ternary(self.clip), own)

    def share(self) -> float:
        """Two bits of 32, sent once where a mean sends twice a half."""
        return 1 / 16
