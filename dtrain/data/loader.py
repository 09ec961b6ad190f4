"""Reader: inputs in the order in which they will be wanted, read ahead where that pays.

Invariant: what is read is the same bits whether ahead or in place; at most `ahead` micro-batches
are held; after `close` no thread is left. A micro-batch that is wanted several times in a row, by
several blocks of a rank, is read once, so nobody may write to what is read.

::

    thread     | read 0 | read 1 |      | read 2 | read 3 |             ahead = 2
    caller     open  ...  read -> 0, compute  read -> 1, compute  read -> 2, compute  close
                                 `- asks for 2         `- asks for 3
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
from dtrain.data.dataset import Dataset
from dtrain.data.sampler import Indices

ALIGNMENT = 64
"""Bytes: where torch lets its own tensors begin."""


@final
class Loader:
    """Reads the inputs of one segment after another.

    A thread of its own reads where the source is slow or samples are augmented. Elsewhere a copy
    costs less than handing it over. Meanwhile the source's `targets` may be asked by another
    thread than its `inputs`.

    Parameters
    ----------
    source : Source
        What is read.
    dtype : torch.dtype
        Of inputs that are floats; others stay as they are.
    augment : Augment, optional
        What is done to them.
    ahead : int
        Micro-batches that may be held before they are asked for; 0 reads in place.

    Raises
    ------
    DtrainError
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
        self.dataset, self._dtype, self._augment, self._prefetch = dataset, dtype, augment, prefetch
        self._index_batches: Iterator[Indices] = iter(())
        self._epoch = 0
        self._thread: ThreadPoolExecutor | None = None
        self._pending_reads: deque[Future[Tensor]] = deque()
        self._latest_read: tuple[Indices, Future[Tensor]] | None = None

    def open(self, index_batches: Iterable[Indices], epoch: int) -> None:
        """Begin a segment; what an earlier one left is dropped.

        Parameters
        ----------
        wanted : iterable of arrays
            The samples of each micro-batch, in the order of the reads.
        epoch : int
            From 0; augmentation depends on it.
        """
        self.close()
        self._index_batches, self._epoch = iter(index_batches), epoch
        if self._prefetch and (self.dataset.slow or self._augment is not None):
            self._submit_reads(self._prefetch)

    def read(self) -> Tensor:
        """Return the next micro-batch, contiguous and aligned; not to be written to.

        It is the very tensor of the read before where the same array of indices is wanted again.

        Raises
        ------
        Exception
            Whatever the source raised, with its traceback.
        RuntimeError
            More reads than were wanted.
        """
        if self._pending_reads:
            x = self._pending_reads.popleft().result()
            self._submit_reads(1)
            return x
        for indices in self._index_batches:
            return self._read_once(indices, self._read_in_place).result()
        raise RuntimeError("nothing more is to be read: every micro-batch that was wanted is")

    def close(self) -> None:
        """End the segment, read to its end or not; waits for a read that is under way."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(cancel_futures=True)
        self._pending_reads.clear()
        self._index_batches, self._latest_read = iter(()), None

    def _submit_reads(self, count: int) -> None:
        """Have the thread read so many more; where nothing is wanted, none is started."""
        for indices in islice(self._index_batches, count):
            self._pending_reads.append(self._read_once(indices, self._read_in_thread))

    def _read_once(
        self, indices: Indices, start_read: Callable[[Indices], Future[Tensor]]
    ) -> Future[Tensor]:
        """Return the read of a micro-batch, begun unless it is the one that was begun last."""
        if self._latest_read is None or self._latest_read[0] is not indices:
            self._latest_read = None  # its memory is free before the next is read
            self._latest_read = indices, start_read(indices)
        return self._latest_read[1]

    def _read_in_thread(self, indices: Indices) -> Future[Tensor]:
        self._thread = self._thread or _make_thread()
        return self._thread.submit(self._load, indices, self._epoch)

    def _read_in_place(self, indices: Indices) -> Future[Tensor]:
        done: Future[Tensor] = Future()
        done.set_result(self._load(indices, self._epoch))
        return done

    def _load(self, indices: Indices, epoch: int) -> Tensor:
        x = self.dataset.inputs(indices)
        if self._augment is not None:
            x = self._augment(x, indices, epoch)
        x = x.to(self._dtype) if x.is_floating_point() else x
        good = x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0
        return x if good else x.clone(memory_format=torch.contiguous_format)


def _make_thread() -> ThreadPoolExecutor:
    """Return a thread that reads, and in which torch works alone.

    A team of its own (OpenMP) would fight with the caller's for the same cores. Setting a thread's
    number also sets that of threads that do not exist yet, so the caller's is set once more.
    """
    number = torch.get_num_threads()
    thread = ThreadPoolExecutor(1, "dtrain-reader")
    thread.submit(_use_one_torch_thread).result()
    torch.set_num_threads(number)
    return thread


def _use_one_torch_thread() -> None:
    torch.get_num_threads()  # a new thread takes over the number of others on its first use
    torch.set_num_threads(1)
