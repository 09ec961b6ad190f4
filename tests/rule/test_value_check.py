"""Values of the data: numbers that are not finite, targets that are alike, missing parts."""

from __future__ import annotations

import math
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from dtrain.data.array_source import MemorySource
from dtrain.data.dataset import DatasetSplits, Subset
from dtrain.data.hdf5_set import open_split
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.statistics import standardise
from dtrain.data.value_check import all_targets_alike, check_finite, has_finite_statistics
from dtrain.errors import DataError
from tests.refusals import refuses


def dataset(x: np.ndarray, y: np.ndarray) -> SourceDataset:
    """Return samples in memory."""
    return SourceDataset(MemorySource(x), MemorySource(y), 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("standardised", [False, True])
def test_a_value_that_is_not_finite_is_named(value: float, standardised: bool) -> None:
    x = np.ones((50, 3, 2), np.float32)
    x[41, 2, 1] = value
    splits = DatasetSplits(dataset(x, np.zeros(50)), dataset(x[:40], np.zeros(40)))
    splits = standardise(splits) if standardised else splits
    assert has_finite_statistics(splits.train) is not standardised
    with refuses(DataError, "data.not-finite") as caught:
        check_finite(splits.train, "train", np.arange(50), math.inf)
    assert all(word in str(caught.value) for word in ("sample 41", "train split", "channel 2"))
    check_finite(splits.test, "test", np.arange(40), math.inf)
    check_finite(splits.train, "train", np.arange(0, 50, 2), math.inf)  # another rank's


def test_a_sample_of_a_part_has_its_number_in_the_whole() -> None:
    x = np.ones((9, 1))
    x[7] = math.nan
    part = Subset(dataset(x, np.zeros(9)), np.array([1, 7, 8]))
    with refuses(DataError, "data.not-finite") as caught:
        check_finite(part, "validation", np.arange(3), math.inf)
    assert "sample 1 of the validation split (sample 7 " in str(caught.value)


def test_a_target_that_is_not_finite_is_named() -> None:
    y = np.zeros((9, 2))
    y[5, 1] = math.inf
    with refuses(DataError, "data.not-finite") as caught:
        check_finite(dataset(np.ones((9, 1)), y), "test", np.arange(9), math.inf)
    assert "sample 5" in str(caught.value)


def test_a_check_ends_at_its_deadline() -> None:
    x = np.full((9, 1), math.nan)
    check_finite(dataset(x, np.zeros(9)), "test", np.arange(9), time.monotonic() - 1)
    assert all_targets_alike(dataset(x, np.zeros(900)), time.monotonic() - 1) is None


def test_bytes_are_not_read() -> None:
    data = dataset(np.zeros((9, 1), np.uint8), np.zeros(9, np.int64))
    data.inputs = None  # type: ignore[method-assign, assignment]
    check_finite(data, "test", np.arange(9), math.inf)


@pytest.mark.parametrize(
    ("y", "value"),
    [
        (np.full(900, 2), 2.0),
        (np.full((900, 4), 0.5), 0.5),
        (np.arange(900) % 3, None),
        (np.where(np.arange(900) == 449, 1, 0), None),
        (np.zeros(1), None),
    ],
)
def test_targets_that_are_all_alike(y: np.ndarray, value: float | None) -> None:
    assert all_targets_alike(dataset(np.zeros((len(y), 1)), y), math.inf) == value


def test_a_missing_part_of_a_virtual_data_set_is_named(tmp_path: Path) -> None:
    layout = h5py.VirtualLayout((8, 2), np.float32)
    for part in range(2):
        path = tmp_path / f"part-{part}.h5"
        with h5py.File(path, "w") as file:
            file["x"] = np.ones((4, 2), np.float32)
        source = h5py.VirtualSource(path.name, "x", shape=(4, 2))
        layout[4 * part : 4 * part + 4] = source
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
        file["y"] = np.arange(8) % 2
    assert open_split(tmp_path / "all.h5").inputs[0].read(np.arange(8)).sum() == 16
    (tmp_path / "part-1.h5").unlink()
    with refuses(DataError, "data.hdf5-part-missing") as caught:
        open_split(tmp_path / "all.h5")
    assert "part-1.h5" in str(caught.value)
