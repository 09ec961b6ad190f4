"""Worker processes as far as none is started: refusals, and memory without a name."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dtrain.config.validate import validate_run
from dtrain.data.loader import Loader
from dtrain.data.shared_memory import SharedMemory
from dtrain.data.user import as_splits
from dtrain.data.worker_pool import WorkerPool
from dtrain.errors import ConfigError
from tests import tiny
from tests.refusals import refuses


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


def test_a_negative_number_is_refused() -> None:
    with refuses(ConfigError, "run-file.number-too-small"):
        validate_run(tiny.run(data__workers=-1))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_shared_memory_has_no_name_and_grows() -> None:
    before = set(os.listdir("/dev/shm"))
    ours = SharedMemory()
    theirs = SharedMemory(os.dup(ours.file_descriptor))
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
