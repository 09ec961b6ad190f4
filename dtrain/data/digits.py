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

from dtrain.data.source import Array, Arrays, Data
from dtrain.errors import DATA, Refusal

TRAIN, TEST = 1437, 360
SPAN = (0.0, 16.0)


@final
@dataclass(frozen=True)
class Digits:
    """The digits; nothing can be chosen."""

    def open(self, folder: Path) -> Data:
        """Return both splits: one channel of 8x8, 0 ... 16 as float32; read on first need.

        Raises
        ------
        Refusal
            With code 3, where scikit-learn is not installed.
        """
        if find_spec("sklearn") is None:
            raise Refusal(
                "data 'digits' come with scikit-learn, which is not installed: "
                "pip install 'dtrain[demo]'",
                DATA,
            )
        parts = cache(_parts)
        return Data(
            Arrays(TRAIN, (1, 8, 8), 10, lambda: parts()[0], lambda: parts()[2], SPAN),
            Arrays(TEST, (1, 8, 8), 10, lambda: parts()[1], lambda: parts()[3], SPAN),
        )


def _parts() -> tuple[Array, Array, Array, Array]:
    """Return x and y of both splits: train x, test x, train y, test y."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, train_size=TRAIN, test_size=TEST, stratify=y, random_state=0
    )
    return train_x, test_x, train_y, test_y
