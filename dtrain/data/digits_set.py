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

from dtrain.data.dataset import Array, ArrayDataset, DatasetSplits
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
        if find_spec("sklearn") is None:
            raise DataError(
                "data.scikit-learn-missing",
                "data 'digits' needs scikit-learn, which is not installed: "
                "pip install 'dtrain[demo]'",
            )
        arrays = cache(_load_arrays)

        def split(size: int, x: int, y: int) -> ArrayDataset:
            return ArrayDataset(
                size, SHAPE, CLASSES, lambda: arrays()[x], lambda: arrays()[y], VALUE_RANGE
            )

        return DatasetSplits(split(TRAIN_SIZE, 0, 2), split(TEST_SIZE, 1, 3))


def _load_arrays() -> tuple[Array, Array, Array, Array]:
    """Return training x, test x, training y and test y."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32).reshape(-1, *SHAPE)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, train_size=TRAIN_SIZE, test_size=TEST_SIZE, stratify=y, random_state=0
    )
    return train_x, test_x, train_y, test_y
