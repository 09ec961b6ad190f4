"""A user's own data: a function that returns four arrays, or a `Data` of its own sources.

Invariant: what the function returns is checked as a file would be; what it raises is the user's
own error and keeps its traceback.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from dtrain.data.dataset import (
    Array,
    ArrayDataset,
    DatasetSplits,
    check_arrays,
    check_labels,
    check_splits,
    value_range,
)
from dtrain.errors import DataError


def as_splits(value: object, location: str) -> DatasetSplits:
    """Return a user's data as `Data`.

    Parameters
    ----------
    made : object
        `Data`, or (x_train, y_train, x_test, y_test) as arrays or tensors; those are kept, not
        copied, where they are arrays or CPU tensors.
    where : str
        The function's name, for the messages.

    Raises
    ------
    DtrainError
        With code 3, for anything else, or for arrays that do not fit each other.
    """
    if isinstance(value, DatasetSplits):
        return check_splits(value, location)
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise DataError(
            "todo.key",
            f"{location} returned {_kind(value)}: return (x_train, y_train, x_test, y_test), "
            f"arrays or tensors, or a dtrain Data",
        )
    x_train, y_train, x_test, y_test = (_array(each) for each in value)
    check_arrays(x_train, y_train, f"{location}, train")
    check_arrays(x_test, y_test, f"{location}, test")
    classes = int(y_train.max()) + 1
    check_labels(y_test, classes, f"{location}, test")
    return check_splits(
        DatasetSplits(_arrays(x_train, y_train, classes), _arrays(x_test, y_test, classes)),
        location,
    )


def _arrays(x: Array, y: Array, classes: int) -> ArrayDataset:
    return ArrayDataset(
        len(x), tuple(x.shape[1:]), classes, lambda: x, lambda: y, value_range(x.dtype)
    )


def _array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _kind(value: object) -> str:
    number = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"a {type(value).__name__}{number}"
