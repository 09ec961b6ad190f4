"""Which samples a replica sees in an update, and in which micro-batch.

Invariant: the samples of an update are pure in (seed, epoch, update); nothing need divide, and
nothing is dropped or seen twice.

::

    order of the epoch   | update 0 | update 1 | ... | short last |
    update               | replica 0    | replica 1    |
    replica              | micro 0 | micro 1 | micro 2 |      parts differ by at most one sample
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrain.data.order import parts

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One replica's part of one update.

    Attributes
    ----------
    shares : tuple of int
        Samples of each replica in the update.
    micros : tuple of arrays
        Indices of each micro-batch that is not empty; together this replica's n_r samples.
    first : int
        Where they begin among the samples of the update.
    """

    shares: tuple[int, ...]
    micros: tuple[Indices, ...]
    first: int = 0

    @property
    def rows(self) -> int:
        """Samples of the update over all replicas (n)."""
        return sum(self.shares)

    @property
    def own(self) -> int:
        """Samples of this replica (n_r)."""
        return sum(len(micro) for micro in self.micros)


@dataclass(frozen=True)
class Shares:
    """How updates are shared out: `size` samples an update, over replicas, then micro-batches.

    Attributes
    ----------
    least : int
        Samples that a part must have, where it has any: 2 for models with batch statistics, which
        a lone sample does not have. It joins its neighbour, and a later part stays empty.
    """

    size: int
    replicas: int
    micros: int
    least: int = 1

    @property
    def largest(self) -> int:
        """Rows of the largest micro-batch."""
        return len(self._parts(len(self._parts(self.size, self.replicas)[0]), self.micros)[0])

    def batch(self, order: Indices, update: int, replica: int) -> Batch:
        """Return the part of `replica` in the update at position `update` of an epoch's order."""
        samples = order[update * self.size : (update + 1) * self.size]
        shared = self._parts(len(samples), self.replicas)
        part = shared[replica]
        own = _slice(samples, part)
        micros = (_slice(own, part) for part in self._parts(len(own), self.micros))
        return Batch(tuple(map(len, shared)), tuple(m for m in micros if len(m)), part.start)

    def sizes(self, total: int, first: int, last: int) -> list[list[int]]:
        """Return ``[replica][update]``: micro-batches in the updates first to last (excluded)."""
        rows = [min(self.size, total - update * self.size) for update in range(first, last)]
        shares = [[len(part) for part in self._parts(n, self.replicas)] for n in rows]
        return [[self._filled(share[r]) for share in shares] for r in range(self.replicas)]

    def _filled(self, count: int) -> int:
        return sum(len(part) > 0 for part in self._parts(count, self.micros))

    def _parts(self, count: int, most: int) -> tuple[range, ...]:
        """Return `most` parts, as many of them filled as have `least` samples each."""
        filled = parts(count, max(1, min(most, count // self.least)))
        return filled + (range(count, count),) * (most - len(filled))


def _slice(samples: Indices, part: range) -> Indices:
    return samples[part.start : part.stop]
