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
from dtrain.data import load_data, shuffle_windows, source_dataset
from dtrain.data.array_source import ArraySource, MemorySource
from dtrain.data.augment import CropFlip
from dtrain.data.dataset import Dataset, DatasetSplits, Subset
from dtrain.data.held_rows import HeldRows
from dtrain.data.loader import Loader, read_ahead_bytes
from dtrain.data.sampler import BatchSplitter, epoch_order
from dtrain.data.shuffle_windows import StoredPieces, shuffle_window
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.statistics import standardise
from dtrain.errors import ConfigError
from dtrain.session.data_notes import full_shuffle_bytes, shuffle_notes
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


# Groups of stored rows


@final
class Disk(ArraySource):
    """1,500 rows of 8 floats in pieces of 25 rows; reads are recorded, and may fail or wait."""

    def __init__(self, chunk_rows: int | None = 25) -> None:
        self.rows = np.random.default_rng(2).normal(size=(1500, 8)).astype(np.float32)
        self.shape, self.dtype, self.location = self.rows.shape, self.rows.dtype, "a disk"
        self.chunk_rows = chunk_rows
        self.reads: list[np.ndarray] = []
        self.fails_at = -1
        self.may_read = threading.Event()
        self.may_read.set()

    def read(self, indices: ArrayLike) -> np.ndarray:
        self.reads.append(np.asarray(indices))
        assert self.may_read.wait(TIMEOUT_S)
        if len(self.reads) - 1 == self.fails_at:
            raise OSError("a disk fails")
        return self.rows[np.asarray(indices)]

    def read_range(self, start: int, stop: int) -> np.ndarray:
        return self.read(np.arange(start, stop))

    def pieces(self) -> int:
        """Return the number of stored pieces that were read, a piece of each read once."""
        return sum(len(np.unique(rows // 25)) for rows in self.reads)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A set on disk, of whose rows 400 fit into a group and 50 into one call."""
    monkeypatch.setattr(source_dataset, "fits_in_memory", lambda size: False)
    monkeypatch.setattr(shuffle_windows, "GROUP_BYTES", 400 * 32)
    return Disk()


def dataset_of(source: ArraySource) -> SourceDataset:
    return SourceDataset(source, MemorySource(np.zeros(len(source), np.int64)), 2)


def micro_batches(
    dataset: Dataset, shuffle: str, batch: int = 64, replicas: int = 1, replica: int = 0
) -> list[np.ndarray]:
    order = epoch_order(dataset.size, 3, 0, shuffle, *shuffle_window(dataset.stored_pieces))
    splitter = BatchSplitter(batch, replicas, 2)
    updates = -(-dataset.size // batch)
    return [
        indices
        for update in range(updates)
        for indices in splitter.batch(order, update, replica).micro_batch_indices
    ]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("batch", [64, 300, 1500])
@pytest.mark.parametrize("shuffle", ["chunks", "full"])
def test_groups_have_the_same_bits(disk: Disk, shuffle: str, batch: int, replicas: int) -> None:
    """Micro-batches across the ends of groups, larger than a window, repeated, and of a part."""
    stored = dataset_of(disk)
    splits = standardise(DatasetSplits(stored, stored))
    for dataset in (stored, splits.train, Subset(splits.train, np.arange(1499, 100, -1))):
        batches = micro_batches(dataset, shuffle, batch, replicas, replicas - 1)
        batches = [each for each in batches for _ in range(2)] + batches[::-1]
        loader = Loader(dataset, torch.float32)
        for _ in range(2):
            loader.open(batches, 0)
            for indices in batches:
                assert torch.equal(loader.read(), dataset.inputs(indices))
            loader.close()


@pytest.mark.parametrize("batch", [30, 64, 100, 375])
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_stored_piece_is_read_once_an_epoch(disk: Disk, batch: int, replicas: int) -> None:
    """The full shuffle reads most pieces for every group."""
    dataset = dataset_of(disk)
    assert shuffle_window(dataset.stored_pieces) == (25, 16)
    pieces = {}
    for shuffle in ("chunks", "full"):
        disk.reads.clear()
        loader = Loader(dataset, torch.float32)
        batches = micro_batches(dataset, shuffle, batch, replicas)
        loader.open(batches, 0)
        for _ in batches:
            loader.read()
        loader.close()
        assert all((np.diff(rows) > 0).all() for rows in disk.reads)
        pieces[shuffle] = disk.pieces()
    assert pieces["chunks"] == 60
    assert pieces["full"] > 90


@pytest.mark.parametrize("chunk_rows", [None, 25])
def test_two_groups_are_in_memory(
    disk: Disk, chunk_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as `read_ahead_bytes` counts, and a third is read when the first is done with."""
    held: list[int] = []
    hold, groups = HeldRows.hold, []

    def record(source: HeldRows, group: object) -> None:
        hold(source, group)
        groups.append(group.rows.nbytes)
        held.append(len(source._groups))

    monkeypatch.setattr(HeldRows, "hold", record)
    dataset = dataset_of(Disk(chunk_rows))
    loader = Loader(dataset, torch.float32)
    batches = micro_batches(dataset, "full")
    loader.open(batches, 0)
    wait_until(lambda: len(held) == 2)
    time.sleep(0.01)
    assert len(held) == 2
    for _ in batches:
        loader.read()
    loader.close()
    assert max(held) == 2
    assert 2 * max(groups) <= read_ahead_bytes(dataset, 32, torch.float32) < 4 * 400 * 32


def test_a_failing_disk_is_an_error_of_the_read(disk: Disk) -> None:
    dataset = dataset_of(disk)
    batches = micro_batches(dataset, "chunks")
    for first in (0, 2):
        disk.reads.clear()
        disk.fails_at = first
        loader = Loader(dataset, torch.float32)
        loader.open(batches, 0)
        with pytest.raises(OSError, match="a disk fails"):
            [loader.read() for _ in batches]
        loader.close()


def test_closed_while_a_group_is_read(disk: Disk) -> None:
    dataset = dataset_of(disk)
    loader = Loader(dataset, torch.float32)
    disk.may_read.clear()
    loader.open(micro_batches(dataset, "chunks"), 0)
    wait_until(lambda: len(disk.reads) == 1)
    threading.Timer(0.05, disk.may_read.set).start()
    loader.close()


@pytest.mark.parametrize(
    ("row_bytes", "chunk_rows", "window"),
    [
        (16384, None, (256, 16)),  # 64 MiB are 4,096 samples
        (3072, 341, (256, 16)),
        (16385, None, (255, 16)),
        (442_368, 1, (9, 16)),
        (150_528, 7, (21, 21)),
        (150_528, 300, (300, 1)),
        (150_528, 10_000, (27, 16)),  # a piece is larger than a group
        (2**27, 1, (1, 1)),
    ],
)
def test_windows_fit_a_group(
    row_bytes: int, chunk_rows: int | None, window: tuple[int, int]
) -> None:
    stored = StoredPieces(row_bytes, chunk_rows)
    assert shuffle_window(stored) == window
    assert row_bytes * window[0] * window[1] <= max(shuffle_windows.GROUP_BYTES, row_bytes)


def test_the_order_of_arrays_does_not_depend_on_their_size() -> None:
    arrays = dataset_of(MemorySource(np.zeros((2, 1_000_000), np.float32)))
    assert shuffle_window(arrays.stored_pieces) == (256, 16)


def test_a_full_shuffle_of_large_pieces_is_noted_at_its_cost(disk: Disk) -> None:
    """The bytes of the estimate are those that are read."""
    disk.chunk_rows = 100
    dataset = dataset_of(disk)
    (note,) = shuffle_notes(dataset, "full")
    assert "rechunk" in note
    loader = Loader(dataset, torch.float32)
    batches = micro_batches(dataset, "full")
    loader.open(batches, 0)
    for _ in batches:
        loader.read()
    loader.close()
    pieces = sum(len(np.unique(rows // 100)) for rows in disk.reads)
    assert dataset.stored_pieces is not None
    planned = full_shuffle_bytes(dataset.stored_pieces, len(disk)) * len(disk)
    assert planned == pytest.approx(pieces * 100 * 32, rel=0.1)


def test_what_a_full_shuffle_does_not_slow_down_is_not_noted(disk: Disk) -> None:
    disk.chunk_rows = 100
    assert not list(shuffle_notes(dataset_of(disk), "chunks"))
    assert not list(shuffle_notes(dataset_of(MemorySource(disk.rows)), "full"))
    disk.chunk_rows = 1
    assert not list(shuffle_notes(dataset_of(disk), "full"))
