"""Read the inputs of a segment, micro-batch by micro-batch, ahead of time where that is faster.

Invariant: reading ahead and in place give the same bits. At most `prefetch` micro-batches are held
ahead. After `close` no thread is left. A micro-batch that several blocks of a rank need one after
another is read once, so no reader may write to it.

::

    thread     | read 0 | read 1 |      | read 2 | read 3 |             prefetch = 2
    caller     open  ...  read -> 0, compute  read -> 1, compute  read -> 2, compute  close
                                 `- submits 2          `- submits 3
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import final

import torch
from torch import Tensor

from dtrain.data.augment import Augment
from dtrain.data.conversion import cast_dtype
from dtrain.data.dataset import Dataset
from dtrain.data.sampler import Indices

ALIGNMENT = 64
"""Bytes to which torch aligns the start of its own tensors."""


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
    ) -> None:
        if augment is not None:
            augment.check_shape(dataset.shape)
        self.dataset = dataset
        self._dtype = dtype
        self._augment = augment
        self._prefetch = prefetch
        self._index_batches: Iterator[Indices] = iter(())
        self._epoch = 0
        self._executor: ThreadPoolExecutor | None = None
        self._pending_reads: deque[Future[Tensor]] = deque()
        self._latest_read: tuple[Indices, Future[Tensor]] | None = None

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
        self._index_batches, self._epoch = iter(index_batches), epoch
        if self._prefetch and (self.dataset.slow or self._augment is not None):
            self._submit_reads(self._prefetch)

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
        if self._pending_reads:
            x = self._pending_reads.popleft().result()
            self._submit_reads(1)
            return x
        for indices in self._index_batches:
            return self._read_once(indices, self._read_in_place).result()
        raise RuntimeError("every micro-batch of the segment has been read")

    def read_other_inputs(self, indices: Indices) -> tuple[Tensor, ...]:
        """Return the further inputs of samples, floating-point ones in the loader's dtype."""
        inputs = self.dataset.read_other_inputs(indices)
        return tuple(x.to(cast_dtype(x.dtype, self._dtype)) for x in inputs)

    def close(self) -> None:
        """End the segment, even before its last read; wait for a read in progress."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(cancel_futures=True)
        self._pending_reads.clear()
        self._index_batches, self._latest_read = iter(()), None

    def _submit_reads(self, count: int) -> None:
        """Submit the next `count` reads to the thread, as far as there are any."""
        for indices in islice(self._index_batches, count):
            self._pending_reads.append(self._read_once(indices, self._read_in_thread))

    def _read_once(
        self, indices: Indices, start_read: Callable[[Indices], Future[Tensor]]
    ) -> Future[Tensor]:
        """Return the latest read where it is of this very array; else start a read."""
        if self._latest_read is None or self._latest_read[0] is not indices:
            self._latest_read = None  # frees its memory before the next read
            self._latest_read = indices, start_read(indices)
        return self._latest_read[1]

    def _read_in_thread(self, indices: Indices) -> Future[Tensor]:
        self._executor = self._executor or _make_thread()
        return self._executor.submit(self._load, indices, self._epoch)

    def _read_in_place(self, indices: Indices) -> Future[Tensor]:
        done: Future[Tensor] = Future()
        done.set_result(self._load(indices, self._epoch))
        return done

    def _load(self, indices: Indices, epoch: int) -> Tensor:
        x = self.dataset.inputs(indices)
        if self._augment is not None:
            x = self._augment(x, indices, epoch)
        x = x.to(cast_dtype(x.dtype, self._dtype))
        aligned = x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0
        return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _make_thread() -> ThreadPoolExecutor:
    """Start a reader thread in which torch uses one core.

    A second OpenMP team would compete with the caller's for the same cores. `set_num_threads` in
    one thread also sets the default of later threads, so the caller's number is set again.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(1, "dtrain-reader")
    executor.submit(_use_one_torch_thread).result()
    torch.set_num_threads(threads)
    return executor


def _use_one_torch_thread() -> None:
    torch.get_num_threads()  # a new thread takes the default over on its first use, so use it first
    torch.set_num_threads(1)
