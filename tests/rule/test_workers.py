"""Worker processes as far as none is started: refusals, and memory without a name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dtrain.config.validate import validate_run
from dtrain.data import load_data
from dtrain.data.augment import build_augment
from dtrain.data.reading.loader import Loader
from dtrain.data.reading.shared_pickle import SharedPickle, load_shared
from dtrain.data.reading.worker_memory import WorkerMemory
from dtrain.data.reading.worker_pool import WorkerPool
from dtrain.data.sample_weights import WeightedArrays
from dtrain.data.user_data import as_splits
from dtrain.errors import ConfigError
from tests import tiny
from tests.conftest import ROOT
from tests.refusals import refuses


def unchanged(sample: torch.Tensor, *_: Any) -> torch.Tensor:
    return sample


def test_data_that_cannot_be_sent_are_refused_before_the_training() -> None:
    class Local(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return torch.zeros(3), index % 2

    split = as_splits((Local(), Local()), "data", classes=2).train
    pool = WorkerPool(1)
    with refuses(ConfigError, "data.workers-not-picklable"):
        Loader(split, torch.float32, workers=pool).start_workers()
    assert not pool.workers


@pytest.mark.parametrize("validation", [0.0, 0.25])
@pytest.mark.parametrize("augment", ["crop-flip", unchanged])
def test_rows_in_memory_are_not_sent_to_workers(augment: Any, validation: float) -> None:
    """Nor are they if samples are held out, standardised, augmented by their index and weighted."""
    x, y = np.zeros((400, 3, 20, 20), np.float32), np.arange(400) % 4
    data = WeightedArrays((x, y, x[:4], y[:4]), np.ones(400))
    splits = load_data("data", {}, ROOT, validation=validation, target=data)
    pool = WorkerPool(1)
    loader = Loader(splits.train, torch.float32, build_augment(augment, 0), workers=pool)
    with mock.patch.object(pool, "start"):
        loader.start_workers()
    assert 0 < sum(sum(payload.sizes) for payload in pool.payloads) < 20_000


def test_arrays_are_shared_and_can_be_written_to(tmp_path: Path) -> None:
    """Arrays, tensors, strided ones, those that share the memory of a file, and small ones."""
    numbers = np.arange(40_000, dtype=np.float32).reshape(200, 200)
    np.save(tmp_path / "numbers.npy", numbers)
    mapped = np.load(tmp_path / "numbers.npy", mmap_mode="r")
    values: dict[str, Any] = {
        "array": numbers,
        "columns": numbers[:, ::2],
        "tensor": torch.from_numpy(numbers),
        "half": torch.from_numpy(numbers).bfloat16(),
        "sparse": torch.from_numpy(numbers).to_sparse(),
        "mapped": mapped[7:],
        "small": np.arange(3),
    }
    payload = SharedPickle(values)
    assert len(payload.pickled) < sum(payload.sizes) - 2 * numbers.nbytes
    copies = [load_shared(os.dup(payload.memory.file_descriptor), payload.sizes) for _ in "ab"]
    payload.memory.close()
    for name, value in values.items():
        for copy in copies:
            assert np.array_equal(as_array(copy[name]), as_array(value)), name
            assert type(copy[name]) is type(value) or name == "columns"
            if name not in ("mapped", "sparse"):
                copy[name][1:] = 5


def as_array(value: Any) -> Any:
    return value.to_dense().float().numpy() if isinstance(value, torch.Tensor) else value


def test_a_negative_number_is_refused() -> None:
    with refuses(ConfigError, "run-file.number-too-small"):
        validate_run(tiny.run(data__workers=-1))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_shared_memory_has_no_name_and_grows() -> None:
    before = set(os.listdir("/dev/shm"))
    ours = WorkerMemory()
    theirs = WorkerMemory(os.dup(ours.file_descriptor))
    for size in (3, 100_000, 7):
        tensors = [
            torch.arange(size, dtype=torch.int16),
            torch.ones(size, 2, dtype=torch.complex64),
            torch.tensor([True]),
            torch.empty(0, 4),
        ]
        places = ours.write(tensors)
        for read, tensor in zip(theirs.read(places), tensors, strict=True):
            assert torch.equal(read, tensor)
            assert (read.dtype, read.shape, read.data_ptr() % 64) == (
                tensor.dtype,
                tensor.shape,
                0,
            )
        ours.array((size,), np.dtype(np.float64))[:] = 0.5
        assert theirs.array((size,), np.dtype(np.float64)).tolist() == [0.5] * size
    assert set(os.listdir("/dev/shm")) == before
    ours.close()
    theirs.close()
