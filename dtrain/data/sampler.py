"""The samples of each update, replica and micro-batch, as a function of (seed, epoch, update).

::

    epoch          7 2 9 0 4 | 1 8 3 6 5 | 11 10    updates of batch-size samples, the last short
    replicas       7 2 9  0 4                       contiguous, sizes differ by at most one
    micro-batches  7 2|9  0|4                       the same, within a replica's samples
    shares 4 and 1 7 2 9 0  4                       replicas of unequal speed

With a sampler the epoch has as many draws as samples, with repetitions; a sample is drawn in
proportion to its weight. The draws are systematic: equal steps along the sums of the weights::

    sums of weights   |--a--|-b-|--------c--------|-d-|     samples in random order
    draws               ^       ^       ^       ^           first position random, then steps
    epoch             c a c b                               shuffled

So a sample occurs as often as expected, rounded down or up (expected 2.5 times: 2 or 3 times);
independent draws would leave out a third of the samples of an epoch by chance. Samples of one group
lie side by side, so the same is true of the group: "balanced" draws each class equally often in
every epoch, up to one.

Invariant: without a sampler an epoch visits every sample once, whatever the shuffle, in the same
order on every machine. For that, only the raw bits of Philox are used, which numpy keeps stable,
not its methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

from dtrain.errors import unknown_name
from dtrain.rng import derive_seed

SHUFFLES = ("full", "chunks")


Indices = NDArray[np.int64]


class DrawWeights(NamedTuple):
    """How often samples are drawn in an epoch.

    Attributes
    ----------
    weights : array
        A number in proportion to the draws of each sample, (n,) float64, at least 0.
    groups : array
        Group of each sample, (n,): the draws of a group are as many as expected, up to one.
    """

    weights: NDArray[np.float64]
    groups: NDArray[Any]


def epoch_order(
    size: int,
    seed: int,
    epoch: int,
    shuffle: str = "full",
    chunk: int = 256,
    window: int = 16,
    draws: DrawWeights | None = None,
) -> Indices:
    """Return the sample indices of an epoch in their order, (size,).

    Parameters
    ----------
    size : int
        Number of samples.
    seed : int
        The run's seed.
    epoch : int
        From 0.
    shuffle : str
        "full": a random permutation. "chunks": chunks of neighbouring samples in random order,
        their samples shuffled within windows of chunks, so that a file is read in long pieces.
    chunk : int
        Samples per chunk.
    window : int
        Chunks per window.
    draws : DrawWeights, optional
        Draws with repetitions, in the order of the shuffle; default: every sample once.

    Raises
    ------
    ConfigError
        An unknown shuffle.
    """
    if shuffle not in SHUFFLES:
        raise unknown_name("shuffle", shuffle, SHUFFLES)
    noise = _random_bits(size, "order", seed, epoch)
    samples = np.arange(size) if draws is None else draw_samples(draws, seed, epoch)
    if shuffle == "full":
        return samples[np.argsort(noise, kind="stable")]
    chunk_order = np.argsort(_random_bits(-(-size // chunk), "chunks", seed, epoch), kind="stable")
    position = np.argsort(chunk_order)
    windows = position[samples // chunk] // window
    return samples[np.lexsort((noise, windows))]


def draw_samples(draws: DrawWeights, seed: int, epoch: int) -> Indices:
    """Return as many draws as there are samples, (n,), in ascending order of their indices."""
    size = len(draws.weights)
    order = np.lexsort((_random_bits(size, "draws", seed, epoch), draws.groups))
    order = order[draws.weights[order] > 0]
    # `cumsum` adds in one order on every machine, `sum` does not.
    sums = np.cumsum(draws.weights[order] / draws.weights.max())
    start = float(_random_bits(1, "first draw", seed, epoch)[0] >> np.uint64(11)) * 2.0**-53
    positions = (start + np.arange(size)) * (sums[-1] / size)
    numbers = np.searchsorted(sums, positions, side="right")
    drawn: Indices = np.sort(order[np.minimum(numbers, len(order) - 1)])
    return drawn


def even_ranges(count: int, n: int) -> tuple[range, ...]:
    """Split `count` samples into `n` contiguous ranges whose lengths differ by at most one.

    Earlier ranges are the longer ones. Ranges may be empty; callers skip those.
    """
    length, longer = divmod(count, n)
    starts = [index * length + min(index, longer) for index in range(n + 1)]
    return tuple(range(*pair) for pair in pairwise(starts))


def shared_ranges(count: int, shares: Sequence[int], min_rows: int = 1) -> tuple[range, ...]:
    """Split `count` samples into contiguous ranges whose lengths are in proportion to `shares`.

    Each length is the exact part, rounded down; the samples that are left go one by one to the
    largest remainders, the earlier one of equals. Equal shares give `even_ranges`.

    Parameters
    ----------
    min_rows : int
        Fewest samples of a range that is not empty. While there is a shorter one, the shortest of
        these, the last of equals, stays empty, and the others share its samples.
    """
    filled = list(range(len(shares)))
    while True:
        lengths = _lengths(count, [shares[index] for index in filled])
        short = [length for length in lengths if 0 < length < min_rows]
        if not short or max(lengths) == count:
            break
        del filled[max(i for i, length in enumerate(lengths) if length == min(short))]
    by_index = dict(zip(filled, lengths, strict=True))
    starts = accumulate((by_index.get(index, 0) for index in range(len(shares))), initial=0)
    return tuple(range(*pair) for pair in pairwise(starts))


def _lengths(count: int, shares: Sequence[int]) -> list[int]:
    """Return parts of `count` in proportion to shares, by largest remainders."""
    total = sum(shares)
    parts = [divmod(count * share, total) for share in shares]
    left = count - sum(length for length, _ in parts)
    order = sorted(range(len(shares)), key=lambda index: -parts[index][1])
    lengths = [length for length, _ in parts]
    for index in order[:left]:
        lengths[index] += 1
    return lengths


def updates_per_epoch(size: int, batch_size: int) -> int:
    """Return the number of updates of an epoch; the last one may be short and is not dropped."""
    return -(-size // batch_size)


def random_order(count: int, *parts: int | str) -> Indices:
    """Return a permutation of `count` indices that depends only on `parts`."""
    return np.argsort(_random_bits(count, *parts), kind="stable")


def _random_bits(count: int, *parts: int | str) -> NDArray[np.uint64]:
    """Return (count,) random bits that depend only on `parts`."""
    bits: NDArray[np.uint64] = Philox(key=derive_seed(*parts)).random_raw(count)
    return bits


@dataclass(frozen=True)
class Batch:
    """One replica's samples of one update.

    Attributes
    ----------
    replica_rows : tuple of int
        Number of samples of each replica in the update.
    micro_batch_indices : tuple of arrays
        Sample indices of each micro-batch that is not empty.
    first_row : int
        Position of this replica's first sample among the samples of the update.
    update_indices : array
        Sample indices of the update, those of all replicas.
    """

    replica_rows: tuple[int, ...]
    micro_batch_indices: tuple[Indices, ...]
    first_row: int = 0
    update_indices: Indices = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def rows(self) -> int:
        """Number of samples of the update over all replicas (n)."""
        return sum(self.replica_rows)

    @property
    def local_rows(self) -> int:
        """Number of samples of this replica (n_r)."""
        return sum(map(len, self.micro_batch_indices))


@dataclass(frozen=True)
class BatchSplitter:
    """Split updates over replicas, and each replica's samples over micro-batches.

    Attributes
    ----------
    batch_size : int
        Samples per update.
    replicas : int
        Number of replicas.
    micro_batches : int
        Micro-batches per update and replica.
    min_rows : int
        Fewest samples of a micro-batch or replica that is not empty. It is 2 for models with batch
        statistics, which one sample does not have: that sample joins its neighbours, and a later
        micro-batch or replica stays empty.
    shares : tuple of int
        Parts of an update that the replicas have, in proportion; empty: equal ones.
    """

    batch_size: int
    replicas: int
    micro_batches: int
    min_rows: int = 1
    shares: tuple[int, ...] = ()

    @property
    def largest_micro_batch(self) -> int:
        """Number of samples of the largest micro-batch."""
        ranges = self._replica_ranges(self.batch_size)
        rows = set(map(len, ranges if self.shares else ranges[:1]))
        return max(len(self._ranges(count, self.micro_batches)[0]) for count in rows)

    def sufficient_batch(self, rows: int) -> int:
        """Return a number of samples of which every replica has at least `rows`."""
        if not self.shares:
            return rows * self.replicas
        return -(-rows * sum(self.shares) // min(self.shares))

    def part(self, count: int, replica: int) -> int:
        """Return the part of `count` samples that a replica has, rounded up."""
        share = self.shares[replica] if self.shares else 1
        return -(-count * share // (sum(self.shares) or self.replicas))

    def batch(self, order: Indices, update: int, replica: int) -> Batch:
        """Return the samples of `replica` in the update at position `update` of an epoch."""
        samples = order[update * self.batch_size : (update + 1) * self.batch_size]
        replica_ranges = self._replica_ranges(len(samples))
        start = replica_ranges[replica].start
        local = _slice(samples, replica_ranges[replica])
        micro_batches = tuple(
            _slice(local, rows) for rows in self._ranges(len(local), self.micro_batches) if rows
        )
        return Batch(tuple(map(len, replica_ranges)), micro_batches, start, samples)

    def count_micro_batches(self, samples: int, start: int, stop: int) -> list[list[int]]:
        """Count micro-batches that are not empty, as ``[replica][update]``.

        Parameters
        ----------
        samples : int
            Size of the training split.
        start, stop : int
            Updates of an epoch, the last one excluded.
        """
        updates = [
            self._replica_ranges(min(self.batch_size, samples - update * self.batch_size))
            for update in range(start, stop)
        ]
        return [
            [self._count_nonempty(len(ranges[replica])) for ranges in updates]
            for replica in range(self.replicas)
        ]

    def _count_nonempty(self, count: int) -> int:
        return sum(len(rows) > 0 for rows in self._ranges(count, self.micro_batches))

    def _replica_ranges(self, count: int) -> tuple[range, ...]:
        """Return the samples of each replica."""
        if self.shares:
            return shared_ranges(count, self.shares, self.min_rows)
        return self._ranges(count, self.replicas)

    def _ranges(self, count: int, n: int) -> tuple[range, ...]:
        """Return `n` ranges, of which as many are filled as can have `min_rows` samples each."""
        filled = even_ranges(count, max(1, min(n, count // self.min_rows)))
        return filled + (range(count, count),) * (n - len(filled))


def _slice(samples: Indices, rows: range) -> Indices:
    return samples[rows.start : rows.stop]
