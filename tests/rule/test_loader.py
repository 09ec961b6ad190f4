"""Loader: the same bits ahead as in place, never too far ahead, and no thread left behind."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dtrain.comm.backends import threads
from dtrain.data import load_data, source_dataset
from dtrain.data.array_source import MemorySource
from dtrain.data.augment import CropFlip
from dtrain.data.dataset import Dataset
from dtrain.data.loader import Loader
from dtrain.data.source_dataset import SourceDataset
from dtrain.errors import ConfigError
from tests.refusals import refuses

X = np.random.default_rng(0).integers(0, 256, (60, 3, 6, 6), dtype=np.uint8)
BATCHES = np.split(np.random.default_rng(1).permutation(60), [7, 20, 21, 40, 50])
TIMEOUT_S = 10.0


@final
class RecordingDataset(Dataset):
    """Samples whose reads are recorded, wait for an event, and may fail."""

    def __init__(self, slow: bool = True, failing_read: int = -1) -> None:
        self.size = 60
        self.shape = (3, 6, 6)
        self.classes = 2
        self._slow = slow
        self.failing_read = failing_read
        self.may_read = threading.Event()
        self.may_read.set()
        self.reading_threads: list[str] = []
        self.torch_threads: list[int] = []

    @property
    def slow(self) -> bool:
        return self._slow

    def inputs(self, indices: ArrayLike) -> Tensor:
        self.reading_threads.append(threading.current_thread().name)
        self.torch_threads.append(torch.get_num_threads())
        if not self.may_read.wait(TIMEOUT_S):
            raise TimeoutError
        if len(self.reading_threads) - 1 == self.failing_read:
            raise KeyError("my own")
        return torch.from_numpy(X[np.asarray(indices)]).float()

    def targets(self, indices: ArrayLike) -> Tensor:
        return torch.zeros(len(np.asarray(indices)), dtype=torch.int64)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for an effect of another thread."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def read_segment(loader: Loader, epoch: int = 0) -> list[Tensor]:
    """Read all micro-batches."""
    loader.open(BATCHES, epoch)
    inputs = [loader.read() for _ in BATCHES]
    loader.close()
    return inputs


# Values


@pytest.mark.parametrize("prefetch", [1, 2, 9])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ahead_as_in_place(prefetch: int, slow: bool, augmented: bool, dtype: torch.dtype) -> None:
    augment = CropFlip(3) if augmented else None
    loader, dataset = Loader(RecordingDataset(slow), dtype, augment, prefetch), RecordingDataset()
    for epoch in (0, 4):
        for x, indices in zip(read_segment(loader, epoch), BATCHES, strict=True):
            expected = dataset.inputs(indices)
            expected = augment(expected, indices, epoch) if augment else expected
            assert torch.equal(x, expected.to(dtype))
            assert (x.dtype, x.is_contiguous(), x.data_ptr() % 64) == (dtype, True, 0)


def test_a_thread_reads_where_reading_is_slow_or_augmented() -> None:
    main = threading.current_thread().name
    for slow, augment, prefetch in ((False, None, 2), (True, None, 0), (True, CropFlip(0), 0)):
        dataset = RecordingDataset(slow)
        read_segment(Loader(dataset, torch.float32, augment, prefetch))
        assert dataset.reading_threads == [main] * len(BATCHES)
    for slow, augment in ((True, None), (False, CropFlip(0))):
        dataset = RecordingDataset(slow)
        read_segment(Loader(dataset, torch.float32, augment))
        assert len(dataset.reading_threads) == len(BATCHES)
        assert main not in dataset.reading_threads
        assert len(set(dataset.reading_threads)) == 1


def test_odd_memory_and_other_dtypes() -> None:
    @final
    class Constant(Dataset):
        size, shape, classes = 60, (4,), 2

        def __init__(self, x: Tensor) -> None:
            self.x = x

        def inputs(self, indices: ArrayLike) -> Tensor:
            return self.x

        def targets(self, indices: ArrayLike) -> Tensor:
            raise NotImplementedError

    floats = torch.arange(64.0)
    for x in (floats[1:9].view(2, 4), floats[:8].view(4, 2).T):
        read = read_segment(Loader(Constant(x), torch.float32))[0]
        assert torch.equal(read, x)
        assert (read.is_contiguous(), read.data_ptr() % 64) == (True, 0)
        assert read.data_ptr() != x.data_ptr()
    tokens = torch.arange(8).view(2, 4)
    assert read_segment(Loader(Constant(tokens), torch.float32))[0].dtype == torch.int64


def test_hdf5_from_disk_is_slow_and_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=X, chunks=(8, 3, 6, 6))
        file["y"] = np.arange(60) % 2
    segments = []
    for in_memory in (True, False):
        monkeypatch.setattr(source_dataset, "fits_in_memory", lambda size, fits=in_memory: fits)
        dataset = load_data("hdf5", {"train": "a.h5", "test": "a.h5"}, tmp_path).train
        assert dataset.slow is not in_memory
        segments.append(read_segment(Loader(dataset, torch.float32, CropFlip(0))))
    assert all(torch.equal(*pair) for pair in zip(*segments, strict=True))


def test_data_sets_are_not_slow_by_default() -> None:
    assert not SourceDataset(MemorySource(X), MemorySource(X), 2).slow


def test_a_shape_that_cannot_be_augmented_is_refused_at_once() -> None:
    flat = SourceDataset(MemorySource(X.reshape(60, -1)), MemorySource(X), 2)
    with refuses(ConfigError, "data.augment-needs-images"):
        Loader(flat, torch.float32, CropFlip(0))


@pytest.mark.parametrize("prefetch", [0, 1, 2, 9])
@pytest.mark.parametrize("slow", [False, True])
def test_a_micro_batch_that_repeats_in_a_row_is_read_once(prefetch: int, slow: bool) -> None:
    """Several blocks of a rank read the same samples: one tensor, one read."""
    a, b = BATCHES[:2]
    dataset = RecordingDataset(slow)
    loader = Loader(dataset, torch.float32, prefetch=prefetch)
    for _ in range(2):  # the second segment reuses no read of the first
        dataset.reading_threads.clear()
        index_batches = [a, a, a, b, b, a, a.copy()]
        loader.open(index_batches, 0)
        inputs = [loader.read() for _ in index_batches]
        for x, indices in zip(inputs, index_batches, strict=True):
            assert torch.equal(x, RecordingDataset().inputs(indices))
        same = [first is second for first, second in itertools.pairwise(inputs)]
        assert same == [True, True, False, True, False, False]
        assert len(dataset.reading_threads) == 4
        with pytest.raises(RuntimeError):
            loader.read()
        loader.close()


# Distance of reading ahead


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_at_most_so_many_are_held(prefetch: int) -> None:
    dataset = RecordingDataset()
    loader = Loader(dataset, torch.float32, prefetch=prefetch)
    loader.open(BATCHES, 0)
    for taken in range(len(BATCHES)):
        reads = min(taken + prefetch, len(BATCHES))
        wait_until(lambda reads=reads: len(dataset.reading_threads) == reads)
        time.sleep(0.01)
        assert len(dataset.reading_threads) == reads
        loader.read()
    loader.close()


def test_indices_are_iterated_by_the_caller_alone_and_no_further_than_needed() -> None:
    iterating_threads: list[str] = []

    def index_batches() -> Iterator[np.ndarray]:
        for indices in BATCHES:
            iterating_threads.append(threading.current_thread().name)
            yield indices

    loader = Loader(RecordingDataset(), torch.float32)
    loader.open(index_batches(), 0)
    loader.read()
    loader.close()
    assert iterating_threads == [threading.current_thread().name] * 3


def test_no_thread_without_micro_batches() -> None:
    before = threading.enumerate()
    loader = Loader(RecordingDataset(), torch.float32)
    loader.open([], 0)
    assert threading.enumerate() == before
    loader.close()


@pytest.mark.parametrize("slow", [False, True])
def test_more_reads_than_micro_batches(slow: bool) -> None:
    loader = Loader(RecordingDataset(slow), torch.float32)
    for index_batches in (BATCHES[:2], []):
        loader.open(index_batches, 0)
        for _ in index_batches:
            loader.read()
        with pytest.raises(RuntimeError):
            loader.read()
        loader.close()
        with pytest.raises(RuntimeError):
            loader.read()


# Ends of segments


@pytest.mark.parametrize("slow", [False, True])
def test_an_error_is_raised_where_it_is_read(slow: bool) -> None:
    loader = Loader(RecordingDataset(slow, failing_read=2), torch.float32)
    loader.open(BATCHES, 0)
    loader.read()
    loader.read()
    with pytest.raises(KeyError, match="my own") as caught:
        loader.read()
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "inputs"
    loader.close()
    loader.close()


def test_closed_before_its_end() -> None:
    dataset = RecordingDataset()
    loader = Loader(dataset, torch.float32, prefetch=4)
    dataset.may_read.clear()
    loader.open(BATCHES, 0)
    wait_until(lambda: len(dataset.reading_threads) == 1)
    threading.Timer(0.05, dataset.may_read.set).start()
    loader.close()
    assert len(dataset.reading_threads) == 1  # the one in progress; submitted ones never start


def test_opened_again_without_a_close() -> None:
    loader = Loader(RecordingDataset(), torch.float32)
    loader.open(BATCHES[::-1], 0)
    loader.read()
    assert torch.equal(read_segment(loader)[0], RecordingDataset().inputs(BATCHES[0]))


def test_the_thread_of_a_deleted_loader_ends() -> None:
    loader = Loader(RecordingDataset(), torch.float32)
    loader.open(BATCHES, 0)
    (thread,) = [t for t in threading.enumerate() if t.name.startswith("dtrain-reader")]
    del loader
    gc.collect()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


# Beside other threads


def test_torch_uses_one_core_in_the_thread_and_as_many_as_before_elsewhere() -> None:
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        dataset = RecordingDataset()
        read_segment(Loader(dataset, torch.float32))
        assert dataset.torch_threads == [1] * len(BATCHES)
        assert torch.get_num_threads() == 3
        new_thread: list[int] = []
        thread = threading.Thread(target=lambda: new_thread.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert new_thread == [3]
    finally:
        torch.set_num_threads(threads_before)


def test_ranks_as_threads() -> None:
    def work(comm: threads.Comm) -> list[Tensor]:
        loader = Loader(RecordingDataset(), torch.float32, CropFlip(0))
        loader.open(BATCHES, 0)
        inputs = []
        for _ in BATCHES:
            inputs.append(loader.read())
            comm.allgather_object(comm.rank)  # lets the other ranks run
        loader.close()
        return inputs

    first, *others = threads.run_ranks(3, work)
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))
