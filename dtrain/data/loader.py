"""Read the inputs of a segment, micro-batch by micro-batch, ahead of time where that is faster.

Invariant: reading ahead and in place give the same bits. At most `prefetch` micro-batches are held
ahead, with worker processes two for each. After `close` no thread is left. A micro-batch that
several blocks of a rank need one after another is read once, so no reader may write to it.

::

    thread     | read 0 | read 1 |      | read 2 | read 3 |             prefetch = 2
    caller     open  ...  read -> 0, compute  read -> 1, compute  read -> 2, compute  close
                                 `- submits 2          `- submits 3

The loader decides which micro-batch is read when. A `BatchReader` decides in which thread or
process. A `GroupReader` reads the stored rows of many micro-batches at once from a disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import final

import numpy as np
import torch
from torch import Tensor

from dtrain.data.array_source import ArraySource
from dtrain.data.augment import Augment
from dtrain.data.batch_readers import (
    BatchReader,
    InPlaceReader,
    PendingRead,
    Preparation,
    Prepared,
    ThreadReader,
)
from dtrain.data.dataset import Dataset
from dtrain.data.held_rows import HeldRows
from dtrain.data.row_groups import (
    BUFFERS,
    PART_BYTES,
    BatchRead,
    GroupReader,
    PrivateBuffer,
)
from dtrain.data.sampler import Indices
from dtrain.data.shuffle_windows import group_rows
from dtrain.data.worker_pool import READS_PER_WORKER, WorkerPool


@final
class Loader:
    """Reads the inputs of one segment after another.

    A thread reads ahead where the data set is slow or samples are augmented. Elsewhere inputs are
    read in place, since passing a tensor between threads takes longer than copying it. The data
    set's `targets` may be called meanwhile from another thread than its `inputs`.

    Parameters
    ----------
    dataset : Dataset
        The samples to read.
    dtype : torch.dtype
        Dtype of real numbers; complex ones are pairs of it, integers stay.
    augment : Augment, optional
        Augmentation of the samples.
    prefetch : int
        Most micro-batches that are read ahead; 0 reads in place.
    workers : WorkerPool, optional
        Processes that read in place of the thread, two micro-batches each.

    Raises
    ------
    ConfigError
        The samples' shape cannot be augmented.
    """

    def __init__(
        self,
        dataset: Dataset,
        dtype: torch.dtype,
        augment: Augment | None = None,
        prefetch: int = 2,
        workers: WorkerPool | None = None,
    ) -> None:
        if augment is not None:
            augment.check_shape(dataset.shape)
        self.dataset = dataset
        self._preparation = Preparation(dataset, dtype, augment)
        self._workers = workers
        self._prefetch = prefetch if workers is None else READS_PER_WORKER * workers.count
        self._reader: BatchReader | None = None
        self._groups: GroupReader | None = None
        self._batches: Iterator[BatchRead] = iter(())
        self._pending_reads: deque[tuple[BatchRead, PendingRead]] = deque()
        self._latest_read: tuple[BatchRead, PendingRead] | None = None
        self._latest: tuple[BatchRead, Prepared] | None = None

    def open(self, index_batches: Iterable[Indices], epoch: int) -> None:
        """Begin a segment; remaining reads of an earlier one are dropped.

        Parameters
        ----------
        index_batches : iterable of arrays
            The sample indices of each micro-batch, in the order of the reads. The iterable is
            advanced in the caller's thread only.
        epoch : int
            From 0; augmentation depends on it.
        """
        self.close()
        self._reader = self._reader or self._make_reader()
        self._batches = _batch_reads(index_batches, epoch)
        if self._groups is not None:
            self._batches = self._groups.open(self._batches, self.dataset.source_indices)
        if self._reads_ahead:
            self._start_reads(self._prefetch)

    def read(self) -> Tensor:
        """Return the next micro-batch, contiguous and aligned; callers must not write to it.

        The same tensor is returned again if the same array of indices is read twice in a row.

        Raises
        ------
        Exception
            Any exception of the data set, with its traceback.
        RuntimeError
            More reads than micro-batches.
        """
        self._latest = None
        if not self._pending_reads:
            self._start_reads(1)
        if not self._pending_reads:
            raise RuntimeError("every micro-batch of the segment has been read")
        batch, read = self._pending_reads.popleft()
        prepared = read.result()
        self._latest = batch, prepared
        if prepared.targets is not None:
            self.dataset.keep_targets(batch.indices, prepared.targets)
        if self._reads_ahead:
            self._start_reads(1)
        return prepared.inputs

    def read_other_inputs(self, indices: Indices) -> tuple[Tensor, ...]:
        """Return the further inputs of samples, floating-point ones in the loader's dtype."""
        if self._latest is not None and self._latest[0].indices is indices:
            others = self._latest[1].others
            if others is not None:
                return others
        return self._preparation.other_inputs(indices)

    def close(self) -> None:
        """End the segment, even before its last read; wait for a read in progress."""
        if self._reader is not None:
            self._reader.close()
        self._pending_reads.clear()
        self._batches, self._latest_read, self._latest = iter(()), None, None

    @property
    def _reads_ahead(self) -> bool:
        is_slow = self.dataset.slow or self._preparation.augment is not None
        return bool(self._prefetch) and is_slow

    def start_workers(self) -> None:
        """Start the worker processes, if they are to read these samples.

        Raises
        ------
        ConfigError
            The data set or its augmentation cannot be sent to other processes.
        """
        if self._workers is not None and self._reads_ahead:
            self._reader = self._reader or self._make_reader()
            self._workers.start()

    def _make_reader(self) -> BatchReader:
        if not self._reads_ahead:
            return InPlaceReader(self._preparation)
        if self._workers is not None:
            reader = self._workers.reader(*self._hold_rows())
            self._groups = reader.groups
            return reader
        if not self.dataset.slow:  # in memory: groups would only copy the rows
            return ThreadReader(self._preparation, None)
        preparation, held = self._hold_rows()
        if held is not None:
            self._groups = GroupReader(held, [PrivateBuffer() for _ in range(BUFFERS)])
        return ThreadReader(preparation, self._groups)

    def _hold_rows(self) -> tuple[Preparation, HeldRows | None]:
        """Return the preparation of samples from a source that holds groups of rows, and that
        source; None where the data set has no source of rows."""
        sources: list[HeldRows] = []

        def hold(source: ArraySource) -> ArraySource:
            sources.append(HeldRows(source))
            return sources[-1]

        dataset = self.dataset.with_samples(hold)
        return replace(self._preparation, dataset=dataset), sources[0] if sources else None

    def _start_reads(self, count: int) -> None:
        """Start the next `count` reads, as far as there are any; a repeated one once."""
        for batch in islice(self._batches, count):
            assert self._reader is not None
            if self._latest_read is None or self._latest_read[0] is not batch:
                self._latest_read = None  # frees its memory before the next read
                self._latest_read = batch, self._reader.start(batch)
            self._pending_reads.append(self._latest_read)


def read_ahead_bytes(
    dataset: Dataset, rows: int, dtype: torch.dtype, prefetch: int = 2, workers: int = 0
) -> int:
    """Return the most bytes that the loader of a slow or augmented data set holds ahead.

    They are the groups of stored rows, the part of one that is being read, and the micro-batches.

    Parameters
    ----------
    dataset : Dataset
        The samples.
    rows : int
        Samples of the largest micro-batch.
    dtype : torch.dtype
        Dtype of floating-point inputs.
    prefetch, workers : int
        Micro-batches that are read ahead, and worker processes, each of which reads two of them.
    """
    ahead = READS_PER_WORKER * workers or prefetch
    numbers = rows * int(np.prod(dataset.shape, dtype=np.int64))
    inputs = ahead * numbers * dtype.itemsize
    stored = dataset.stored_pieces
    if stored is None or not dataset.slow:
        return inputs
    group = max(group_rows(stored.row_bytes), rows) * stored.row_bytes
    return inputs + BUFFERS * group + min(group, max(PART_BYTES, stored.piece_bytes))


def _batch_reads(index_batches: Iterable[Indices], epoch: int) -> Iterator[BatchRead]:
    """Yield the reads of micro-batches; a repeated array is the same read."""
    latest: BatchRead | None = None
    for indices in index_batches:
        if latest is None or latest.indices is not indices:
            latest = BatchRead(indices, epoch)
        yield latest
