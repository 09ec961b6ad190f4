"""Data of a user's function, which returns four or six arrays or a `DatasetSplits`.

Invariant: the result is checked like a file. An exception inside the function keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from dtrain.data.array_source import MemorySource
from dtrain.data.conversion import Array
from dtrain.data.dataset import DatasetSplits, check_splits
from dtrain.data.source_dataset import SplitSources, make_splits
from dtrain.data.torch_datasets import are_torch_datasets, item_splits
from dtrain.data.weights import WeightedArrays, check_weights
from dtrain.errors import DataError
from dtrain.tasks.task import DEFAULT_TASK, Task


def as_splits(
    value: object, location: str, task: Task = DEFAULT_TASK, classes: int | None = None
) -> DatasetSplits:
    """Check the result of a user's function and return it as two splits.

    Parameters
    ----------
    value : object
        `DatasetSplits`; or (x_train, y_train, x_test, y_test) as arrays or tensors, after which
        x_validation and y_validation may follow; or two or three map-style
        `torch.utils.data.Dataset` in that order, which are read by index; or `WeightedArrays`
        around one of these. Samples of several inputs are a tuple or dict of arrays, in the order
        of the model's arguments. Arrays and CPU tensors are not copied.
    location : str
        The function's name, for the messages.
    task : Task
        Decides which targets are legal.
    classes : int, optional
        Number of classes of torch Datasets, so that not all labels are read at the start.

    Raises
    ------
    DataError
        A value of another type, or arrays that do not fit each other.
    """
    if isinstance(value, DatasetSplits):
        if value.train.sample_weights is not None:
            check_weights(value.train.sample_weights, value.train.size, f"{location}: the weights")
        return check_splits(value, location)
    if isinstance(value, WeightedArrays):
        splits = as_splits(value.data, location, task, classes)
        weights = check_weights(value.weights, splits.train.size, f"{location}: the weights")
        splits.train.sample_weights = weights
        return splits
    if are_torch_datasets(value):
        assert isinstance(value, list | tuple)
        return make_splits(item_splits(value, location, task, classes), task)
    if not isinstance(value, list | tuple) or len(value) not in (4, 6):
        raise DataError(
            "data.function-result",
            f"{location} returned {_describe(value)}: return (x_train, y_train, x_test, y_test) "
            f"as arrays or tensors, with or without x_validation and y_validation at the end, or "
            "two map-style torch Datasets, or a dtrain.data.dataset.DatasetSplits",
        )
    parts = {}
    for name, x, y in zip(("train", "test", "validation"), value[::2], value[1::2], strict=False):
        place = f"{location}, {name}"
        inputs = tuple(MemorySource(_to_array(item), place) for item in _inputs(x))
        targets = (
            None if y is None and task.target == "input" else MemorySource(_to_array(y), place)
        )
        parts[name] = SplitSources(place, inputs, targets)
    return make_splits(parts, task)


def _inputs(value: Any) -> list[Any]:
    """Return the inputs of samples that have several, a tuple, list or dict of arrays; or one."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if _has_several(value) else [value]


def _has_several(value: Any) -> bool:
    is_sequence = isinstance(value, list | tuple) and len(value) > 1
    return is_sequence and all(isinstance(item, np.ndarray | Tensor) for item in value)


def _to_array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _describe(value: object) -> str:
    length = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"a {type(value).__name__}{length}"
