"""Order: which samples an update learns from, pure in (seed, epoch, update).

::

    order    7 2 9 0 4 | 1 8 3 6 5 | 11 10      updates of batch-size samples, the last one short
    parts    7 2 9  0 4                         replicas: contiguous, differ by at most one sample
    parts    7 2|9  0|4                         micro-batches: the same, within a replica's part

Invariant: an epoch's order holds every sample once, whatever the shuffle, and is the same on every
machine: only the raw bits of Philox are used, which numpy keeps stable, and not its methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

from dtrain.errors import unknown_name
from dtrain.rng import derive_seed

SHUFFLES = ("full", "chunks")


def epoch_order(
    size: int, seed: int, epoch: int, shuffle: str = "full", chunk: int = 256, window: int = 16
) -> NDArray[np.int64]:
    """Return all sample indices in an epoch's order.

    Parameters
    ----------
    size : int
        Number of samples.
    seed, epoch : int
        The run's seed, the epoch from 0.
    shuffle : str
        "full": any order. "chunks": runs of `chunk` neighbours come in random order and are
        shuffled within windows of `window` runs, so that a file is read in long pieces.
    chunk, window : int
        Samples in a run, runs in a window.

    Raises
    ------
    DtrainError
        An unknown shuffle.
    """
    if shuffle not in SHUFFLES:
        raise unknown_name("shuffle", shuffle, SHUFFLES)
    noise = _random_bits(size, "order", seed, epoch)
    if shuffle == "full":
        return np.argsort(noise, kind="stable")
    drawn = np.argsort(_random_bits(-(-size // chunk), "chunks", seed, epoch), kind="stable")
    place = np.argsort(drawn)
    windows = place[np.arange(size) // chunk] // window
    return np.lexsort((noise, windows))


def even_ranges(count: int, n: int) -> tuple[range, ...]:
    """Split `count` samples into `n` contiguous parts that differ by at most one.

    Earlier parts are the larger ones; parts may be empty, and callers skip those.
    """
    each, more = divmod(count, n)
    starts = [part * each + min(part, more) for part in range(n + 1)]
    return tuple(range(*pair) for pair in pairwise(starts))


def updates_per_epoch(size: int, batch_size: int) -> int:
    """Return the number of updates; the last one may be short and is never dropped."""
    return -(-size // batch_size)


def _random_bits(count: int, *parts: int | str) -> NDArray[np.uint64]:
    """Return random bits that depend on `parts` alone."""
    bits: NDArray[np.uint64] = Philox(key=derive_seed(*parts)).random_raw(count)
    return bits


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

    replica_rows: tuple[int, ...]
    micro_batch_indices: tuple[Indices, ...]
    first_row: int = 0

    @property
    def rows(self) -> int:
        """Samples of the update over all replicas (n)."""
        return sum(self.replica_rows)

    @property
    def local_rows(self) -> int:
        """Samples of this replica (n_r)."""
        return sum(len(micro) for micro in self.micro_batch_indices)


@dataclass(frozen=True)
class BatchSplitter:
    """How updates are shared out: `size` samples an update, over replicas, then micro-batches.

    Attributes
    ----------
    least : int
        Samples that a part must have, where it has any: 2 for models with batch statistics, which
        a lone sample does not have. It joins its neighbour, and a later part stays empty.
    """

    batch_size: int
    replicas: int
    micro_batches: int
    min_rows: int = 1

    @property
    def largest_micro_batch(self) -> int:
        """Rows of the largest micro-batch."""
        return len(
            self._ranges(len(self._ranges(self.batch_size, self.replicas)[0]), self.micro_batches)[
                0
            ]
        )

    def batch(self, order: Indices, update: int, replica: int) -> Batch:
        """Return the part of `replica` in the update at position `update` of an epoch's order."""
        samples = order[update * self.batch_size : (update + 1) * self.batch_size]
        shared = self._ranges(len(samples), self.replicas)
        part = shared[replica]
        own = _slice(samples, part)
        micros = (_slice(own, part) for part in self._ranges(len(own), self.micro_batches))
        return Batch(tuple(map(len, shared)), tuple(m for m in micros if len(m)), part.start)

    def count_micro_batches(self, samples: int, start: int, stop: int) -> list[list[int]]:
        """Return ``[replica][update]``: micro-batches in the updates first to last (excluded)."""
        rows = [
            min(self.batch_size, samples - update * self.batch_size)
            for update in range(start, stop)
        ]
        shares = [[len(part) for part in self._ranges(n, self.replicas)] for n in rows]
        return [[self._count_nonempty(share[r]) for share in shares] for r in range(self.replicas)]

    def _count_nonempty(self, count: int) -> int:
        return sum(len(part) > 0 for part in self._ranges(count, self.micro_batches))

    def _ranges(self, count: int, number: int) -> tuple[range, ...]:
        """Return `most` parts, as many of them filled as have `least` samples each."""
        filled = even_ranges(count, max(1, min(number, count // self.min_rows)))
        return filled + (range(count, count),) * (number - len(filled))


def _slice(samples: Indices, rows: range) -> Indices:
    return samples[rows.start : rows.stop]
