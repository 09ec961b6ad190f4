"""Read the stored rows of the coming micro-batches group by group, one group ahead.

Invariant: at most two groups are in memory, one in use and one being read. Each stored piece of a
group is read once. Micro-batches are cut from the groups as they are cut from the data set, so the
bits are the same without groups.

::

    order of an epoch   | window 0            | window 1            |
    micro-batches       | 0    | 1    | 2    | 3    | 4    | 5    |      3 has rows of both windows
    groups              | group 0             | group 1             |
    thread              | read 0 | read 1 |   ...   | read 2, when 3 is cut from group 0 |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol, final

import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.held_rows import HeldRows, RowGroup
from dtrain.data.sampler import Indices
from dtrain.data.shuffle_windows import group_rows

BUFFERS = 2
"""Groups in memory."""


PART_BYTES = 2**23
"""Bytes of a group that are read by one call, if a stored piece is not larger."""


@final
@dataclass(eq=False)
class BatchRead:
    """One micro-batch that is to be read.

    Attributes
    ----------
    indices : array of int
        Its samples.
    epoch : int
        From 0; augmentation depends on it.
    groups : list of RowGroup
        The groups that hold its rows.
    last_of : list of RowGroup
        The groups that no later micro-batch needs.
    """

    indices: Indices
    epoch: int
    groups: list[RowGroup] = field(default_factory=list)
    last_of: list[RowGroup] = field(default_factory=list)


class RowBuffer(Protocol):
    """Memory for the rows of one group."""

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array in the buffer, which grows if needed; earlier arrays are invalid."""


@final
class PrivateBuffer:
    """A buffer in the memory of this process."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = np.empty(0, np.uint8)  # frees it first
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


@final
class GroupReader:
    """Reads the groups of one segment after another in a thread.

    Parameters
    ----------
    held : HeldRows
        The source that gets the groups.
    buffers : sequence of RowBuffer
        Memory of the groups; as many groups are in memory at once.
    """

    def __init__(self, held: HeldRows, buffers: Sequence[RowBuffer]) -> None:
        self.held, self.buffers = held, buffers
        self._limit = group_rows(held.row_bytes)
        self._lock = Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._free: list[int] = []
        self._waiting: deque[RowGroup] = deque()

    def open(
        self, batches: Iterator[BatchRead], source_indices: Callable[[Indices], Indices]
    ) -> Iterator[BatchRead]:
        """Begin a segment; return its micro-batches with their groups, which are being read.

        Parameters
        ----------
        source_indices : callable
            Returns the stored rows of samples.
        """
        self.close()
        self._free = list(range(len(self.buffers)))
        return GroupPlan(batches, source_indices, self._limit, self.held.chunk_rows, self._begin)

    def wait(self, batch: BatchRead) -> None:
        """Wait for the groups of a micro-batch.

        Raises
        ------
        Exception
            Any exception of the read.
        """
        for group in batch.groups:
            group.loaded.result()

    def release(self, batch: BatchRead) -> None:
        """Free the groups that no micro-batch after this one needs."""
        for group in batch.last_of:
            self.held.release(group)
            with self._lock:
                if group.rows is not None:
                    self._free.append(group.buffer)
        batch.groups, batch.last_of = [], []
        self._start_reads()

    def close(self) -> None:
        """End the segment; wait for a read in progress."""
        with self._lock:
            executor, self._executor = self._executor, None
            waiting, self._waiting, self._free = list(self._waiting), deque(), []
        if executor is not None:
            executor.shutdown()
        for group in waiting:
            group.loaded.cancel()
        self.held.release_all()

    def _begin(self, group: RowGroup) -> None:
        with self._lock:
            self._executor = self._executor or ThreadPoolExecutor(1, "dtrain-group-reader")
            self._waiting.append(group)
        self._start_reads()

    def _start_reads(self) -> None:
        """Submit the reads for which there is a free buffer."""
        with self._lock:
            while self._executor is not None and self._free and self._waiting:
                group = self._waiting.popleft()
                group.buffer = self._free.pop(0)
                self._executor.submit(self._read, group)

    def _read(self, group: RowGroup) -> None:
        try:
            group.indices = np.unique(group.indices)
            held, indices = self.held, group.indices
            shape = (len(indices), *held.shape[1:])
            rows = self.buffers[group.buffer].array(shape, held.dtype)
            for part in _parts(indices, held):
                rows[part] = held.source.read(indices[part])
            group.rows = rows
            held.hold(group)
            group.loaded.set_result(None)
        except BaseException as error:
            group.loaded.set_exception(error)


@final
class GroupPlan:
    """Iterator over micro-batches that assigns their rows to groups.

    When the first micro-batch of a group is returned, the next group has begun.

    Parameters
    ----------
    batches : iterator of BatchRead
        A micro-batch that is read several times in a row is the same object.
    source_indices : callable
        Returns the stored rows of samples.
    limit : int
        Most rows of a group, if no micro-batch is larger.
    chunk_rows : int or None
        Rows of a stored piece.
    begin : callable
        Called with each new group.
    """

    def __init__(
        self,
        batches: Iterator[BatchRead],
        source_indices: Callable[[Indices], Indices],
        limit: int,
        chunk_rows: int | None,
        begin: Callable[[RowGroup], None],
    ) -> None:
        self._batches, self._source_indices = batches, source_indices
        self._limit, self._chunk_rows = limit, chunk_rows or 1
        self._begin = begin
        self._queue: deque[BatchRead] = deque()
        self._ungrouped: deque[tuple[BatchRead, Indices]] = deque()  # rows that are in no group yet
        self._latest: BatchRead | None = None
        self._newest_group: RowGroup | None = None
        self._is_exhausted = False

    def __iter__(self) -> Iterator[BatchRead]:
        return self

    def __next__(self) -> BatchRead:
        while self._needs_group():
            self._fill()
            if not self._ungrouped:
                break
            self._begin_group()
        if not self._queue:
            raise StopIteration
        return self._queue.popleft()

    def _needs_group(self) -> bool:
        """Return whether the next micro-batch is not wholly in groups, or is in the newest one."""
        if not self._queue:
            return True
        first = self._queue[0]
        is_ungrouped = bool(self._ungrouped) and self._ungrouped[0][0] is first
        return is_ungrouped or any(group is self._newest_group for group in first.groups)

    def _fill(self) -> None:
        """Take micro-batches until their rows fill a group."""
        count = sum(len(rows) for _, rows in self._ungrouped)
        while count < self._limit and not self._is_exhausted:
            batch = next(self._batches, None)
            if batch is None:
                self._is_exhausted = True
                return
            self._queue.append(batch)
            if batch is not self._latest:
                rows = self._source_indices(batch.indices)
                self._ungrouped.append((batch, rows))
                count += len(rows)
            self._latest = batch

    def _begin_group(self) -> None:
        """Move rows into a new group."""
        largest = max(len(rows) for _, rows in self._ungrouped)
        rows = np.concatenate([rows for _, rows in self._ungrouped])
        limit = max(self._limit, largest)  # a micro-batch has rows of two groups at most
        length = len(rows)
        if not self._is_exhausted or length > limit:
            length = group_length(rows[:limit], largest, self._chunk_rows)
        group = self._newest_group = RowGroup(rows[:length])
        while length:
            batch, own = self._ungrouped.popleft()
            batch.groups.append(group)
            if len(own) > length:
                self._ungrouped.appendleft((batch, own[length:]))
            length = max(0, length - len(own))
        batch.last_of.append(group)
        self._begin(group)


def group_length(rows: Indices, least: int, chunk_rows: int) -> int:
    """Return how many of the first rows make the group with the fewest stored pieces per row.

    Such a group ends where a window of `shuffle = "chunks"` ends: later rows are in pieces that the
    group does not have.

    Parameters
    ----------
    rows : array of int
        The stored rows in the order in which they are needed, as many as fit into a group.
    least : int
        Fewest rows of the group.
    """
    if chunk_rows == 1:
        return len(rows)
    _, first_positions = np.unique(rows // chunk_rows, return_index=True)
    is_first = np.zeros(len(rows), np.int64)
    is_first[first_positions] = 1
    pieces_per_row = (np.cumsum(is_first) / np.arange(1, len(rows) + 1))[least - 1 :]
    is_best = np.isclose(pieces_per_row, pieces_per_row.min(), rtol=1e-9, atol=0)
    return least + int(np.flatnonzero(is_best)[-1])  # the longest of equal ones


def _parts(indices: Indices, source: HeldRows) -> Iterator[slice]:
    """Yield slices of ascending rows of about `PART_BYTES`, no stored piece in two of them."""
    size = max(1, PART_BYTES // max(1, source.row_bytes))
    ends = np.flatnonzero(np.diff(indices // (source.chunk_rows or 1))) + 1
    start = 0
    while start < len(indices):
        before = np.searchsorted(ends, start + size, side="right")
        stop = int(ends[before - 1]) if before else start
        if stop <= start:  # one piece is larger
            stop = int(ends[before]) if before < len(ends) else len(indices)
        if start + size >= len(indices):
            stop = len(indices)
        yield slice(start, stop)
        start = stop
