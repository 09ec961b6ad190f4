"""Data of a user's function, which returns four arrays or a `DatasetSplits`.

Invariant: the result is checked like a file. An exception inside the function keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dtrain.data.dataset import (
    Array,
    ArrayDataset,
    DatasetSplits,
    check_arrays,
    check_splits,
    target_dtype,
    torch_dtype,
    value_range,
)
from dtrain.data.targets import TargetScan
from dtrain.errors import DataError
from dtrain.tasks.task import DEFAULT_TASK, Task


def as_splits(value: object, location: str, task: Task = DEFAULT_TASK) -> DatasetSplits:
    """Check the result of a user's function and return it as two splits.

    Parameters
    ----------
    value : object
        `DatasetSplits`, or (x_train, y_train, x_test, y_test) as arrays or tensors. Arrays and CPU
        tensors are not copied.
    location : str
        The function's name, for the messages.
    task : Task
        Decides which targets are legal.

    Raises
    ------
    DataError
        A value of another type, or arrays that do not fit each other.
    """
    if isinstance(value, DatasetSplits):
        return check_splits(value, location)
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise DataError(
            "data.function-result",
            f"{location} returned {_describe(value)}: return (x_train, y_train, x_test, y_test) "
            f"as arrays or tensors, or a dtrain.data.dataset.DatasetSplits",
        )
    x_train, y_train, x_test, y_test = _to_arrays(value, task)
    scans = []
    for x, y, name in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        scan = TargetScan(y, f"{location}, {name}", task)
        check_arrays(x, y, f"{location}, {name}")
        scan.add(y)
        scans.append(scan)
    classes = scans[0].count_outputs()
    for scan in scans:
        scan.check_classes(classes)
    train, test = _make_split(x_train, y_train, classes), _make_split(x_test, y_test, classes)
    return check_splits(DatasetSplits(train, test), location)


def _make_split(x: Array, y: Array, classes: int) -> ArrayDataset:
    return ArrayDataset(
        len(x),
        tuple(x.shape[1:]),
        classes,
        lambda: x,
        lambda: y,
        value_range(x.dtype),
        tuple(y.shape[1:]),
        target_dtype(y.dtype),
        torch_dtype(x.dtype),
    )


def _to_arrays(values: Sequence[Any], task: Task) -> list[Array]:
    """Return the four arrays; targets may be None where the input is the target."""
    arrays: list[Array] = []
    for value in values:
        if value is None and len(arrays) % 2 and task.target == "input":
            value = np.zeros(len(arrays[-1]), np.int64)  # never read
        arrays.append(_to_array(value))
    return arrays


def _to_array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _describe(value: object) -> str:
    length = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"a {type(value).__name__}{length}"
