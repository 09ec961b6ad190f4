"""Handwritten digits: the 1,797 images of 8x8 that scikit-learn ships (UCI, Alpaydin & Kaynak).

Invariant: the split is stratified and drawn with a fixed seed, into 1,437 and 360, whatever the
run's own seed.
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

TRAIN_SIZE, TEST_SIZE = 1437, 360


VALUE_RANGE = (0.0, 16.0)


@final
@dataclass(frozen=True)
class Digits:
    """The digits; nothing can be chosen."""

    def open(self, folder: Path) -> DatasetSplits:
        """Return both splits: one channel of 8x8, 0 ... 16 as float32; read on first need.

        Raises
        ------
        DtrainError
            With code 3, where scikit-learn is not installed.
        """
        if find_spec("sklearn") is None:
            raise DataError(
                "todo.key",
                "data 'digits' come with scikit-learn, which is not installed: "
                "pip install 'dtrain[demo]'",
            )
        parts = cache(_load_arrays)
        return DatasetSplits(
            ArrayDataset(
                TRAIN_SIZE, (1, 8, 8), 10, lambda: parts()[0], lambda: parts()[2], VALUE_RANGE
            ),
            ArrayDataset(
                TEST_SIZE, (1, 8, 8), 10, lambda: parts()[1], lambda: parts()[3], VALUE_RANGE
            ),
        )


def _load_arrays() -> tuple[Array, Array, Array, Array]:
    """Return x and y of both splits: train x, test x, train y, test y."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, train_size=TRAIN_SIZE, test_size=TEST_SIZE, stratify=y, random_state=0
    )
    return train_x, test_x, train_y, test_y
