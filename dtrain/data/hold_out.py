"""Hold out a part of the training split for validation.

Invariant: which samples are held out depends only on the seed, the share and the labels, never on
ranks or on the machine.

::

    training split   0 1 2 3 4 5 6 7 8 9        validation = 0.2
    labels           a a b a b b a a b b
    held out               x         x          the same share of every class
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtrain.data.dataset import Dataset, DatasetSplits, Subset
from dtrain.data.sampler import random_order
from dtrain.errors import DataError
from dtrain.tasks.task import Task


def hold_out(splits: DatasetSplits, share: float, seed: int, task: Task) -> DatasetSplits:
    """Return the splits with `share` of the training samples as validation split.

    Every class gives the same share, up to one sample, if each sample has one label.

    Raises
    ------
    DataError
        The data have a validation split already, or one of the two parts would be empty.
    """
    if splits.validation is not None:
        raise DataError(
            "data.validation-twice",
            f"[data] validation = {share}, but the data have a validation split of their own: "
            "leave validation out",
        )
    train, validation = set_aside(splits.train, share, "validation", seed, task)
    return DatasetSplits(train, splits.test, validation)


def set_aside(
    train: Dataset, share: float, key: str, seed: int, task: Task
) -> tuple[Subset, Subset]:
    """Return the training samples without a share of them, and that share.

    Parameters
    ----------
    key : str
        The split that the share becomes: the key of its random numbers and of the run file.

    Raises
    ------
    DataError
        One of the two parts would be empty.
    """
    count = round(share * train.size)
    if not 0 < count < train.size:
        raise DataError(
            f"data.{key}-empty",
            f"[data] {key} = {share} of {train.size} training samples leaves one part empty: "
            "give another share",
        )
    order = random_order(train.size, key, seed)
    if has_labels(train, task):
        order = _interleave_classes(order, train.targets(np.arange(train.size)).numpy())
    held_out = np.zeros(train.size, bool)
    held_out[order[:count]] = True
    return Subset(train, np.flatnonzero(~held_out)), Subset(train, np.flatnonzero(held_out))


def has_labels(split: Dataset, task: Task) -> bool:
    """Return whether each sample has one class label."""
    kind = task.kind_of(is_integer=not split.target_dtype.is_floating_point)
    return task.target == "data" and kind == "classes" and split.target_shape == ()


def _interleave_classes(order: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return an order of the samples whose every beginning has all classes in their shares.

    The i-th of n samples of a class comes at (i + 1/2) / n of the new order.
    """
    positions = np.empty(len(order))
    ordered_labels = labels[order]
    for label in np.unique(labels):
        members = np.flatnonzero(ordered_labels == label)
        positions[members] = (np.arange(len(members)) + 0.5) / len(members)
    result: NDArray[np.int64] = order[np.argsort(positions, kind="stable")]
    return result
