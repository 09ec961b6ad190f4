"""Map-style datasets of torch as splits: every item is read once, into memory."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from torch import Tensor

from dtrain.data.conversion import Array
from dtrain.errors import DataError


def are_torch_datasets(values: object) -> bool:
    """Return whether values are two or three `torch.utils.data.Dataset`."""
    module = sys.modules.get("torch.utils.data")  # imported, if a Dataset exists
    return (
        module is not None
        and isinstance(values, list | tuple)
        and len(values) in (2, 3)
        and all(isinstance(value, module.Dataset) for value in values)
    )


def read_items(dataset: Any, location: str) -> tuple[Any, Array]:
    """Read all items of a map-style dataset.

    Returns
    -------
    array or tuple of arrays
        The samples (n, ...), a tuple where an item has several inputs.
    array
        The targets (n, ...).

    Raises
    ------
    DataError
        The dataset has no length, or an item is no pair of sample and target, or items differ in
        shape.
    """
    if not hasattr(dataset, "__len__"):
        raise DataError(
            "data.iterable-dataset",
            f"{location}: {type(dataset).__name__} has no length: give a map-style Dataset, which "
            "has __len__ and __getitem__",
        )
    items = [dataset[index] for index in range(len(dataset))]
    for index, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(
                "data.dataset-item",
                f"{location}: item {index} of {type(dataset).__name__} is no pair: return (sample, "
                "target), with a tuple as the sample if the model takes several inputs",
            )
    samples, targets = zip(*items, strict=True) if items else ((), ())
    several = bool(samples) and isinstance(samples[0], tuple | list)
    try:
        if several:
            inputs: Any = tuple(_stack(column) for column in zip(*samples, strict=True))
        else:
            inputs = _stack(samples)
        return inputs, _stack(targets)
    except ValueError as error:
        raise DataError(
            "data.dataset-shapes",
            f"{location}: items of {type(dataset).__name__} differ in shape ({error}): make them "
            "equal, for example by a transform",
        ) from error


def _stack(values: Any) -> Array:
    """Return values as one array (n, ...)."""
    arrays = [v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for v in values]
    return np.stack(arrays)
