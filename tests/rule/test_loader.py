"""Reader: the same bits ahead as in place, never too far ahead, and no thread left behind."""

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
from dtrain.data import hdf5, load_data
from dtrain.data.augment import CropFlip
from dtrain.data.dataset import ArrayDataset, Dataset
from dtrain.data.loader import Loader
from dtrain.errors import DtrainError

X = np.random.default_rng(0).integers(0, 256, (60, 3, 6, 6), dtype=np.uint8)
MICROS = np.split(np.random.default_rng(1).permutation(60), [7, 20, 21, 40, 50])
PATIENCE_S = 10.0


@final
class Watched(Dataset):
    """Samples whose reading is watched, may wait for a gate, and may fail."""

    def __init__(self, slow: bool = True, bad: int = -1) -> None:
        self.size, self.shape, self.classes = 60, (3, 6, 6), 2
        self._slow, self.bad = slow, bad
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.teams: list[int] = []

    @property
    def slow(self) -> bool:
        return self._slow

    def inputs(self, indices: ArrayLike) -> Tensor:
        self.begun.append(threading.current_thread().name)
        self.teams.append(torch.get_num_threads())
        if not self.gate.wait(PATIENCE_S):
            raise TimeoutError
        if len(self.begun) - 1 == self.bad:
            raise KeyError("my own")
        return torch.from_numpy(X[np.asarray(indices)]).float()

    def targets(self, indices: ArrayLike) -> Tensor:
        return torch.zeros(len(np.asarray(indices)), dtype=torch.int64)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def until(done: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def segment(reader: Loader, epoch: int = 0) -> list[Tensor]:
    """Read all micro-batches."""
    reader.open(MICROS, epoch)
    got = [reader.read() for _ in MICROS]
    reader.close()
    return got


# What is read


@pytest.mark.parametrize("ahead", [1, 2, 9])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_ahead_as_in_place(ahead: int, slow: bool, augmented: bool, kind: torch.dtype) -> None:
    augment = CropFlip(3) if augmented else None
    reader, source = Loader(Watched(slow), kind, augment, ahead), Watched()
    for epoch in (0, 4):
        got = segment(reader, epoch)
        for x, indices in zip(got, MICROS, strict=True):
            expected = source.inputs(indices)
            expected = augment(expected, indices, epoch) if augment else expected
            assert torch.equal(x, expected.to(kind))
            assert (x.dtype, x.is_contiguous(), x.data_ptr() % 64) == (kind, True, 0)


def test_who_reads() -> None:
    main = threading.current_thread().name
    for slow, augment, ahead in ((False, None, 2), (True, None, 0), (True, CropFlip(0), 0)):
        source = Watched(slow)
        segment(Loader(source, torch.float32, augment, ahead))
        assert source.begun == [main] * len(MICROS)
    for slow, augment in ((True, None), (False, CropFlip(0))):
        source = Watched(slow)
        segment(Loader(source, torch.float32, augment))
        assert len(source.begun) == len(MICROS)
        assert main not in source.begun
        assert len(set(source.begun)) == 1


def test_odd_memory_and_other_dtypes() -> None:
    @final
    class Odd(Dataset):
        size, shape, classes = 60, (4,), 2

        def __init__(self, made: Tensor) -> None:
            self.made = made

        def inputs(self, indices: ArrayLike) -> Tensor:
            return self.made

        def targets(self, indices: ArrayLike) -> Tensor:
            raise NotImplementedError

    floats = torch.arange(64.0)
    for made in (floats[1:9].view(2, 4), floats[:8].view(4, 2).T):
        got = segment(Loader(Odd(made), torch.float32))[0]
        assert torch.equal(got, made)
        assert (got.is_contiguous(), got.data_ptr() % 64) == (True, 0)
        assert got.data_ptr() != made.data_ptr()
    tokens = torch.arange(8).view(2, 4)
    assert segment(Loader(Odd(tokens), torch.float32))[0].dtype == torch.int64


def test_hdf5_from_disk_is_slow_and_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=X, chunks=(8, 3, 6, 6))
        file["y"] = np.arange(60) % 2
    got = []
    for whole in (True, False):
        monkeypatch.setattr(hdf5, "fits_in_memory", lambda size, whole=whole: whole)
        source = load_data("hdf5", {"train": "a.h5", "test": "a.h5"}, tmp_path).train
        assert source.slow is not whole
        got.append(segment(Loader(source, torch.float32, CropFlip(0))))
    assert all(torch.equal(*pair) for pair in zip(*got, strict=True))


def test_sources_are_fast_unless_they_say_otherwise() -> None:
    assert not ArrayDataset(60, (3, 6, 6), 2, lambda: X, lambda: X).slow


def test_what_cannot_be_augmented_is_refused_at_once() -> None:
    flat = ArrayDataset(60, (108,), 2, lambda: X.reshape(60, -1), lambda: X)
    with pytest.raises(DtrainError, match=r"\(108,\)"):
        Loader(flat, torch.float32, CropFlip(0))


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
@pytest.mark.parametrize("slow", [False, True])
def test_what_is_wanted_again_in_a_row_is_read_once(ahead: int, slow: bool) -> None:
    """Several blocks of a rank read the same samples: one tensor, one read."""
    a, b = MICROS[:2]
    source = Watched(slow)
    reader = Loader(source, torch.float32, prefetch=ahead)
    for _ in range(2):  # nothing is remembered from one segment to the next
        source.begun.clear()
        wanted = [a, a, a, b, b, a, a.copy()]
        reader.open(wanted, 0)
        got = [reader.read() for _ in wanted]
        for x, indices in zip(got, wanted, strict=True):
            assert torch.equal(x, Watched().inputs(indices))
        same = [one is other for one, other in itertools.pairwise(got)]
        assert same == [True, True, False, True, False, False]
        assert len(source.begun) == 4
        with pytest.raises(RuntimeError, match="nothing more"):
            reader.read()
        reader.close()


# How far ahead


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_at_most_so_many_are_held(ahead: int) -> None:
    source = Watched()
    reader = Loader(source, torch.float32, prefetch=ahead)
    reader.open(MICROS, 0)
    for taken in range(len(MICROS)):
        most = min(taken + ahead, len(MICROS))
        until(lambda most=most: len(source.begun) == most)
        time.sleep(0.01)
        assert len(source.begun) == most
        reader.read()
    reader.close()


def test_wanted_is_asked_for_by_the_caller_alone_and_no_further_than_needed() -> None:
    asked: list[str] = []

    def wanted() -> Iterator[np.ndarray]:
        for indices in MICROS:
            asked.append(threading.current_thread().name)
            yield indices

    reader = Loader(Watched(), torch.float32)
    reader.open(wanted(), 0)
    reader.read()
    reader.close()
    assert asked == [threading.current_thread().name] * 3


def test_no_thread_where_nothing_is_wanted() -> None:
    before = threading.enumerate()
    reader = Loader(Watched(), torch.float32)
    reader.open([], 0)
    assert threading.enumerate() == before
    reader.close()


@pytest.mark.parametrize("slow", [False, True])
def test_more_than_was_wanted(slow: bool) -> None:
    reader = Loader(Watched(slow), torch.float32)
    for wanted in (MICROS[:2], []):
        reader.open(wanted, 0)
        for _ in wanted:
            reader.read()
        with pytest.raises(RuntimeError, match="nothing more"):
            reader.read()
        reader.close()
        with pytest.raises(RuntimeError, match="nothing more"):
            reader.read()


# How it ends


@pytest.mark.parametrize("slow", [False, True])
def test_an_error_is_raised_where_it_is_read(slow: bool) -> None:
    reader = Loader(Watched(slow, bad=2), torch.float32)
    reader.open(MICROS, 0)
    reader.read()
    reader.read()
    with pytest.raises(KeyError, match="my own") as caught:
        reader.read()
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "inputs"
    reader.close()
    reader.close()


def test_closed_before_its_end() -> None:
    source = Watched()
    reader = Loader(source, torch.float32, prefetch=4)
    source.gate.clear()
    reader.open(MICROS, 0)
    until(lambda: len(source.begun) == 1)
    threading.Timer(0.05, source.gate.set).start()
    reader.close()
    assert len(source.begun) == 1  # the one under way; those that were asked for are not begun


def test_opened_again_without_a_close() -> None:
    reader = Loader(Watched(), torch.float32)
    reader.open(MICROS[::-1], 0)
    reader.read()
    assert torch.equal(segment(reader)[0], Watched().inputs(MICROS[0]))


def test_forgotten() -> None:
    reader = Loader(Watched(), torch.float32)
    reader.open(MICROS, 0)
    (thread,) = [t for t in threading.enumerate() if t.name.startswith("dtrain-reader")]
    del reader
    gc.collect()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


# Company


def test_torch_works_alone_in_the_thread_and_as_before_elsewhere() -> None:
    number = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        source = Watched()
        segment(Loader(source, torch.float32))
        assert source.teams == [1] * len(MICROS)
        assert torch.get_num_threads() == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(number)


def test_ranks_as_threads() -> None:
    def work(comm: threads.Comm) -> list[Tensor]:
        reader = Loader(Watched(), torch.float32, CropFlip(0))
        reader.open(MICROS, 0)
        got = []
        for _ in MICROS:
            got.append(reader.read())
            comm.allgather_object(comm.rank)  # passes the baton
        reader.close()
        return got

    first, *others = threads.run_ranks(3, work)
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))
