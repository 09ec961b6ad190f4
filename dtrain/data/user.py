"""Data of a user's function, which returns four or six arrays or a `DatasetSplits`.

Invariant: the result is checked like a file. An exception inside the function keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from dtrain.data.label_map import LabelNumbering
from dtrain.data.targets import TargetScan
from dtrain.data.torch_datasets import are_torch_datasets, read_items
from dtrain.errors import DataError
from dtrain.tasks.task import DEFAULT_TASK, Task


def as_splits(
    value: object,
    location: str,
    task: Task = DEFAULT_TASK,
    labels: LabelNumbering = "as-stored",
) -> DatasetSplits:
    """Check the result of a user's function and return it as two splits.

    Parameters
    ----------
    value : object
        `DatasetSplits`; or (x_train, y_train, x_test, y_test) as arrays or tensors, after which
        x_validation and y_validation may follow; or two or three map-style
        `torch.utils.data.Dataset` in that order, which are read into memory. Samples of several
        inputs are a tuple or dict of arrays, in the order of the model's arguments. Arrays and CPU
        tensors are not copied.
    location : str
        The function's name, for the messages.
    task : Task
        Decides which targets are legal.
    labels : "as-stored" or "compact"
        The numbers of the classes.

    Raises
    ------
    DataError
        A value of another type, or arrays that do not fit each other.
    """
    if isinstance(value, DatasetSplits):
        return check_splits(value, location)
    if are_torch_datasets(value):
        assert isinstance(value, list | tuple)
        value = [array for dataset in value for array in read_items(dataset, location)]
    if not isinstance(value, list | tuple) or len(value) not in (4, 6):
        raise DataError(
            "data.function-result",
            f"{location} returned {_describe(value)}: return (x_train, y_train, x_test, y_test) "
            f"as arrays or tensors, with or without x_validation and y_validation at the end, or "
            "two map-style torch Datasets, or a dtrain.data.dataset.DatasetSplits",
        )
    others = [_other_arrays(x) for x in value[::2]]
    first_inputs = [
        _first_input(item) if position % 2 == 0 else item for position, item in enumerate(value)
    ]
    arrays = _to_arrays(first_inputs, task)
    pairs = list(zip(arrays[::2], arrays[1::2], strict=True))
    scans: list[TargetScan] = []
    for (x, y), name in zip(pairs, ("train", "test", "validation"), strict=False):
        train = scans[0] if scans else None
        scan = TargetScan(y, f"{location}, {name}", task, labels, train)
        check_arrays(x, y, f"{location}, {name}")
        scan.add(y)
        scans.append(scan)
    classes = scans[0].count_outputs()
    splits = []
    for (x, y), scan, other in zip(pairs, scans, others, strict=True):
        scan.check_classes(classes)
        splits.append(_make_split(x, y, scan, classes, other))
        _check_others(splits[-1], other, location)
    return check_splits(DatasetSplits(*splits), location)


def _first_input(value: Any) -> Any:
    """Return the first input of samples that have several: a tuple, list or dict of arrays."""
    if isinstance(value, Mapping):
        return next(iter(value.values()))
    return value[0] if _has_several(value) else value


def _has_several(value: Any) -> bool:
    is_sequence = isinstance(value, list | tuple) and len(value) > 1
    return is_sequence and all(isinstance(item, np.ndarray | Tensor) for item in value)


def _other_arrays(value: Any) -> list[Array]:
    if isinstance(value, Mapping):
        return [_to_array(item) for item in list(value.values())[1:]]
    return [_to_array(item) for item in value[1:]] if _has_several(value) else []


def _check_others(split: ArrayDataset, others: Sequence[Array], location: str) -> None:
    for number, array in enumerate(others, start=1):
        if array.dtype.kind not in "biuf" or len(array) != split.size:
            raise DataError(
                "data.other-input",
                f"{location}: input {number} has dtype {array.dtype} and {len(array)} samples: "
                f"give numbers, {split.size} samples as the first input has",
            )


def _make_split(
    x: Array, y: Array, scan: TargetScan, classes: int, others: Sequence[Array]
) -> ArrayDataset:
    split = ArrayDataset(
        len(x),
        tuple(x.shape[1:]),
        classes,
        lambda: x,
        lambda: scan.convert(y),
        value_range(x.dtype),
        scan.shape[1:],
        target_dtype(scan.dtype),
        torch_dtype(x.dtype),
        others,
    )
    split.class_labels = scan.class_labels
    return split


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
