"""Class labels numbered from 0: the sorted distinct labels of the training split are 0 ... K - 1.

::

    stored labels     1  7  7  3  1       "dog"  "cat"  "dog"
    numbers           0  2  2  1  0          1      0      1

Invariant: the map depends on the labels of the training split alone, so it is the same on all ranks
and in every start. Labels that do not count (`[task] ignore-index`) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dtrain.data.conversion import Array
from dtrain.data.dataset import SAMPLES_PER_READ, Dataset, DatasetSplits, DatasetView, Label
from dtrain.errors import DataError
from dtrain.tasks.task import Task


@final
class LabelMap:
    """The numbers of the classes by label.

    Parameters
    ----------
    labels : iterable of int or str
        The distinct labels of the training split, without `ignored`.
    ignored : int, optional
        The label of positions that do not count.

    Attributes
    ----------
    labels : tuple of (int or str)
        The label of each class, in order.

    Raises
    ------
    DataError
        `ignored` is the number of a class.
    """

    def __init__(self, labels: Iterable[Label], ignored: int | None = None) -> None:
        self.labels: tuple[Label, ...] = tuple(sorted(labels))
        self.ignored = ignored
        self._sorted = np.array(self.labels)
        if ignored is not None and 0 <= ignored < len(self.labels):
            raise DataError(
                "data.compact-ignore-index",
                f'[data] labels = "compact" numbers {len(self.labels)} classes from 0, and [task] '
                f"ignore-index = {ignored} is one of these numbers: store the labels that do not "
                "count as -1 and set ignore-index = -1",
            )

    def check(self, labels: Array, location: str, first_sample: int = 0) -> None:
        """Refuse labels (k, ...) of the samples from `first_sample` on that have no number.

        Raises
        ------
        DataError
            It names the label and its sample.
        """
        is_unknown = ~(np.isin(labels, self._sorted) | self._is_ignored(labels))
        if is_unknown.any():
            place = tuple(np.argwhere(is_unknown)[0])
            raise DataError(
                "data.labels-unknown",
                f"{location}: label {labels[place].item()!r} of sample {first_sample + place[0]} "
                f"is in no training sample, so it has no number: remove the sample, or set [data] "
                'labels = "as-stored"',
            )

    def apply(self, labels: Array) -> Array:
        """Return the numbers of known labels, int64; ignored labels stay."""
        numbers = np.searchsorted(self._sorted, labels).astype(np.int64)
        if self.ignored is not None:
            numbers[self._is_ignored(labels)] = self.ignored
        return numbers

    def _is_ignored(self, labels: Array) -> Array:
        if self.ignored is None or labels.dtype.kind == "U":
            return np.zeros(labels.shape, bool)
        return np.asarray(labels == self.ignored)


def distinct_labels(labels: Array, ignored: int | None = None) -> set[Label]:
    """Return the distinct labels that count, as Python's own numbers or texts."""
    values: set[Label] = set(np.unique(labels).tolist())
    return {int(v) if isinstance(v, bool) else v for v in values if v != ignored}


@final
class RenumberedLabels(DatasetView):
    """Another data set with the labels of a map."""

    def __init__(self, dataset: Dataset, label_map: LabelMap) -> None:
        super().__init__(dataset)
        self.classes = len(label_map.labels)
        self.class_labels = label_map.labels
        self._map = label_map

    def targets(self, indices: ArrayLike) -> Tensor:
        return torch.from_numpy(self._map.apply(self._dataset.targets(indices).numpy()))


def with_compact_labels(splits: DatasetSplits, task: Task, location: str) -> DatasetSplits:
    """Return the splits with compact labels; all labels are read once, part by part.

    Raises
    ------
    DataError
        The targets are no class labels, or a label of another split is in no training sample.
    """
    train = splits.train
    if train.class_labels:  # numbered while the data were opened
        return splits
    if task.kind_of(is_integer=not train.target_dtype.is_floating_point) != "classes":
        raise no_labels(location)
    found: set[Label] = set()
    for rows in _parts(train):
        found |= distinct_labels(train.targets(rows).numpy(), task.ignore_index)
    label_map = LabelMap(found, task.ignore_index)
    for name, split in splits.by_name().items():
        for rows in _parts(split) if name != "train" else ():
            label_map.check(split.targets(rows).numpy(), f"{location}, {name}", int(rows[0]))
    return splits.map(lambda split: RenumberedLabels(split, label_map))


def no_labels(location: str) -> DataError:
    """Return the error of targets that have no labels to number."""
    return DataError(
        "data.compact-without-labels",
        f'{location}: [data] labels = "compact" numbers class labels, but these targets are none: '
        "leave the key out",
    )


def _parts(split: Dataset) -> Iterable[Array]:
    return np.array_split(np.arange(split.size), -(-split.size // SAMPLES_PER_READ))
