"""Order: which samples an update learns from, pure in (seed, epoch, update).

::

    order    7 2 9 0 4 | 1 8 3 6 5 | 11 10      updates of batch-size samples, the last one short
    parts    7 2 9  0 4                         replicas: contiguous, differ by at most one sample
    parts    7 2|9  0|4                         micro-batches: the same, within a replica's part

Invariant: an epoch's order holds every sample once, whatever the shuffle, and is the same on every
machine: only the raw bits of Philox are used, which numpy keeps stable, and not its methods.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

from dtrain.errors import unknown
from dtrain.seeds import key

SHUFFLES = ("full", "chunks")


def order(
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
    Refusal
        An unknown shuffle.
    """
    if shuffle not in SHUFFLES:
        raise unknown("shuffle", shuffle, SHUFFLES)
    noise = _noise(size, "order", seed, epoch)
    if shuffle == "full":
        return np.argsort(noise, kind="stable")
    drawn = np.argsort(_noise(-(-size // chunk), "chunks", seed, epoch), kind="stable")
    place = np.argsort(drawn)
    windows = place[np.arange(size) // chunk] // window
    return np.lexsort((noise, windows))


def parts(count: int, n: int) -> tuple[range, ...]:
    """Split `count` samples into `n` contiguous parts that differ by at most one.

    Earlier parts are the larger ones; parts may be empty, and callers skip those.
    """
    each, more = divmod(count, n)
    starts = [part * each + min(part, more) for part in range(n + 1)]
    return tuple(range(*pair) for pair in pairwise(starts))


def updates_per_epoch(size: int, batch: int) -> int:
    """Return the number of updates; the last one may be short and is never dropped."""
    return -(-size // batch)


def _noise(count: int, *parts: int | str) -> NDArray[np.uint64]:
    """Return random bits that depend on `parts` alone."""
    bits: NDArray[np.uint64] = Philox(key=key(*parts)).random_raw(count)
    return bits
