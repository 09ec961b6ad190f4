"""Read micro-batches in place or ahead in a thread; worker processes are in `worker_pool`.

Invariant: every reader calls the same `Preparation`, so the bits do not depend on the reader.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from dtrain.data.augment import Augment
from dtrain.data.conversion import cast_dtype
from dtrain.data.dataset import Dataset
from dtrain.data.row_groups import BatchRead, GroupReader
from dtrain.data.sampler import Indices

ALIGNMENT = 64
"""Bytes to which torch aligns the start of its own tensors."""


class Prepared(NamedTuple):
    """One micro-batch as the model takes it.

    Attributes
    ----------
    inputs : Tensor
        The samples (n, ...).
    others : tuple of Tensor or None
        Their further inputs; None: not read with the samples.
    targets : Tensor or None
        Their targets as the items have them; None: known without the items.
    """

    inputs: Tensor
    others: tuple[Tensor, ...] | None = None
    targets: Tensor | None = None


@final
@dataclass(frozen=True)
class Preparation:
    """Reads, standardises and augments the samples of a micro-batch.

    Attributes
    ----------
    dataset : Dataset
        The samples.
    dtype : torch.dtype
        Dtype of floating-point inputs; others keep theirs.
    augment : Augment or None
        Augmentation of the samples.
    """

    dataset: Dataset
    dtype: torch.dtype
    augment: Augment | None = None

    def __call__(self, indices: Indices, epoch: int) -> Prepared:
        """Return a micro-batch, contiguous and aligned."""
        x = self.dataset.inputs(indices)
        if self.augment is not None:
            numbers = indices
            if self.augment.by_source_index:
                numbers = self.dataset.source_indices(indices)
            x = self.augment(x, numbers, epoch)
        x = self.cast(x)
        aligned = x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0
        x = x if aligned else x.clone(memory_format=torch.contiguous_format)
        if not self.dataset.reads_items:
            return Prepared(x)
        return Prepared(x, self.other_inputs(indices), self.dataset.item_targets(indices))

    def other_inputs(self, indices: Indices) -> tuple[Tensor, ...]:
        """Return the further inputs of samples."""
        return tuple(map(self.cast, self.dataset.read_other_inputs(indices)))

    def cast(self, x: Tensor) -> Tensor:
        """Return real and complex numbers in the precision of the run."""
        return x.to(cast_dtype(x.dtype, self.dtype))


class PendingRead(Protocol):
    """A read that has started."""

    def result(self) -> Prepared:
        """Wait for the micro-batch and return it, or raise the exception of the read."""


class BatchReader(Protocol):
    """Starts reads of micro-batches, in the order in which they are needed."""

    def start(self, batch: BatchRead) -> PendingRead:
        """Start the read of a micro-batch."""

    def close(self) -> None:
        """End the segment: drop reads that have not started."""


@final
class InPlaceReader:
    """Reads each micro-batch when it is needed."""

    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation

    def start(self, batch: BatchRead) -> Future[Prepared]:
        done: Future[Prepared] = Future()
        done.set_result(self._preparation(batch.indices, batch.epoch))
        return done

    def close(self) -> None:
        pass


@final
class ThreadReader:
    """Reads micro-batches in a thread.

    Parameters
    ----------
    preparation : Preparation
        It is called in the thread.
    groups : GroupReader or None
        It reads the rows of the micro-batches in another thread.
    """

    def __init__(self, preparation: Preparation, groups: GroupReader | None) -> None:
        self._preparation, self._groups = preparation, groups
        self._executor: ThreadPoolExecutor | None = None

    def start(self, batch: BatchRead) -> Future[Prepared]:
        self._executor = self._executor or _make_thread()
        return self._executor.submit(self._read, batch)

    def _read(self, batch: BatchRead) -> Prepared:
        if self._groups is None:
            return self._preparation(batch.indices, batch.epoch)
        self._groups.wait(batch)
        try:
            return self._preparation(batch.indices, batch.epoch)
        finally:
            self._groups.release(batch)

    def close(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
        if self._groups is not None:
            self._groups.close()
        if executor is not None:
            executor.shutdown()


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
