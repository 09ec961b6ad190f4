"""PowerSGD: what crosses between nodes are two thin factors per matrix.

Gradients (or, around another sync, movements of weights) become products P Q' of rank k, by one
step of a power iteration per mean that starts where the last one ended; what the product lacks is
kept by each replica and added to the next one. Vectors, and matrices that are not `worth` it,
travel as they are.

Sends, over n replicas on m nodes, 2 (m - 1) (k (a + b) per matrix + all else) elements between
nodes per mean, and 2 (n - m) of them inside, in two means one after the other. Staleness: that of
the inner sync, and what a replica keeps. On one node it is the inner sync.

Source: Vogels et al. 2019, arXiv 1905.13727; defaults of torch's hook, whose start after ten
updates is the wrapper `warmup` here.

Invariant: all replicas apply the same product; the sum of all products, plus the mean of what
replicas keep, is the sum of all gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.syncs.parts.carrier import Carrier
from dtrain.syncs.parts.power import Power
from dtrain.syncs.parts.smaller import Smaller
from dtrain.syncs.sync import least


@final
@dataclass
class PowerSGD(Smaller):
    """Low-rank transfers between nodes, with error feedback.

    Attributes
    ----------
    rank : int
        Columns of the factors (k).
    worth : float
        How many times its factors a matrix must be to travel as them; torch calls it
        ``min_compression_rate``.
    """

    remembers: ClassVar[bool] = True
    rank: int = 1
    worth: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        least("rank", self.rank, 1)
        least("worth", self.worth, 1)

    def carries(self, what: str) -> Carrier:
        """Return a carrier whose first Q is the same on all replicas."""
        return Power(self.rank, self.worth, ("powersgd", what, self.block.seed))

    def share(self) -> float:
        """Of a square matrix of a thousand rows; vectors are few."""
        return 2 * self.rank / 1000
