"""Handwritten digits: the 1,797 images of 8x8 that scikit-learn ships (UCI, Alpaydin & Kaynak).

Invariant: the split into 1,437 and 360 is stratified and drawn with a fixed seed, not the run's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import final

import numpy as np

from dtrain.data.array_source import LazySource
from dtrain.data.conversion import Array
from dtrain.data.dataset import DatasetSplits
from dtrain.data.source_dataset import SourceDataset
from dtrain.errors import DataError
from dtrain.tasks.task import DEFAULT_TASK, Task

TRAIN_SIZE, TEST_SIZE = 1437, 360


SHAPE, CLASSES = (1, 8, 8), 10


VALUE_RANGE = (0.0, 16.0)


@final
@dataclass(frozen=True)
class Digits:
    """The digits; `[data]` has no keys for them."""

    def open(self, folder: Path, task: Task = DEFAULT_TASK) -> DatasetSplits:
        """Return both splits: (1, 8, 8) float32 from 0 to 16, ten classes; read on first need.

        Raises
        ------
        DataError
            scikit-learn is not installed.
        """
        path = _csv_path()
        if path is None:
            raise DataError(
                "data.scikit-learn-missing",
                "data 'digits' needs scikit-learn, which is not installed: "
                "pip install 'dtrain[demo]'",
            )
        arrays = cache(lambda: _load_arrays(path))

        def split(size: int, x: int, y: int) -> SourceDataset:
            samples = LazySource((size, *SHAPE), np.float32, lambda: arrays()[x], str(path))
            labels = LazySource((size,), np.int64, lambda: arrays()[y], str(path))
            return SourceDataset(samples, labels, CLASSES, value_range=VALUE_RANGE)

        return DatasetSplits(split(TRAIN_SIZE, 0, 2), split(TEST_SIZE, 1, 3))


def _csv_path() -> Path | None:
    """Return scikit-learn's file of digits, None where it is not installed.

    An import of scikit-learn takes more than a second, which every rank would pay.
    """
    package = find_spec("sklearn")
    folders = (package and package.submodule_search_locations) or ()
    paths = [Path(folder, "datasets", "data", "digits.csv.gz") for folder in folders]
    return next((path for path in paths if path.exists()), None)


def _load_arrays(path: Path) -> tuple[Array, Array, Array, Array]:
    """Return training x, test x, training y and test y."""
    rows = np.loadtxt(path, dtype=np.uint8, delimiter=",")
    x = rows[:, :-1].astype(np.float32).reshape(-1, *SHAPE)
    y = rows[:, -1].astype(np.int64)
    train, test = stratified_split(y, TRAIN_SIZE, TEST_SIZE)
    return x[train], x[test], y[train], y[test]


def stratified_split(labels: Array, train_size: int, test_size: int) -> tuple[Array, Array]:
    """Return the indices of two random subsets with the same shares of all classes.

    The numbers are those of scikit-learn's `train_test_split(stratify=labels, random_state=0)`.
    """
    random = np.random.RandomState(0)
    counts = np.bincount(labels)
    train_counts = _share_out(counts, train_size, random)
    test_counts = _share_out(counts - train_counts, test_size, random)
    train, test = list[int](), list[int]()
    for label, (first, second) in enumerate(zip(train_counts, test_counts, strict=True)):
        indices = random.permutation(np.flatnonzero(labels == label)).tolist()
        train += indices[:first]
        test += indices[first : first + second]
    return random.permutation(train), random.permutation(test)


def _share_out(counts: Array, total: int, random: np.random.RandomState) -> Array:
    """Return integers of the given total in proportion to `counts`.

    What rounding down leaves goes to the largest remainders, by lot among equal ones.
    """
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    remainders = exact - shares
    missing = int(total - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing == 0:
            break
        indices = np.flatnonzero(remainders == remainder)
        chosen = random.choice(indices, size=min(len(indices), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
    integers: Array = shares.astype(np.int64)
    return integers
