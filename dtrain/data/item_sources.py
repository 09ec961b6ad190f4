"""Sources whose rows are the items of a map-style torch Dataset, read one by one.

Invariant: an item is read when a row of it is needed, never all of them at once. Items are read by
one thread at a time. Targets that were read with samples are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dtrain.data.array_source import ArraySource
from dtrain.data.conversion import Array
from dtrain.errors import DataError


class ItemRows(NamedTuple):
    """Items as arrays of rows: the samples and their further inputs, and the targets."""

    inputs: tuple[Array, ...]
    targets: Array


@final
class ItemReader:
    """Reads the items of a map-style Dataset; other processes get the Dataset alone.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        Its items are (sample, target); the sample is a tuple or dict where there are several
        inputs.
    location : str
        For messages.

    Attributes
    ----------
    first : ItemRows or None
        The first item; None while it is read.

    Raises
    ------
    DataError
        The Dataset has no length or no items, or its first item is no pair of sample and target.
    """

    def __init__(self, dataset: Any, location: str) -> None:
        self.dataset, self.location = dataset, location
        self.name = type(dataset).__name__
        if not hasattr(dataset, "__len__"):
            raise DataError(
                "data.iterable-dataset",
                f"{location}: {self.name} has no length: give a map-style Dataset, which has "
                "__len__ and __getitem__",
            )
        self.size = len(dataset)
        if not self.size:
            raise DataError("data.dataset-empty", f"{location}: {self.name} has no items: add some")
        self.first: ItemRows | None = None
        self._reset()
        self.first = self.read(np.zeros(1, np.int64))

    def _reset(self) -> None:
        self._lock = Lock()
        self._latest: tuple[Array, ItemRows] | None = None
        self._targets: Array | None = None
        self._is_known: NDArray[np.bool_] = np.zeros(0, np.bool_)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._reset()

    def read(self, indices: ArrayLike) -> ItemRows:
        """Read items; the same indices as those of the latest read are not read again.

        Raises
        ------
        DataError
            An item is no pair, or items differ in shape.
        """
        order = np.asarray(indices)
        with self._lock:
            if self._latest is not None and np.array_equal(self._latest[0], order):
                return self._latest[1]
            self._latest = None
            rows = self._read(order)
            self._latest = order.copy(), rows
            self._keep(order, rows.targets)
        return rows

    def targets(self, indices: ArrayLike) -> Array:
        """Return targets; only those are read that no earlier read has met."""
        order = np.asarray(indices)
        if self._targets is None or not self._is_known[order].all():
            missing = order if self._targets is None else order[~self._is_known[order]]
            if len(missing) == len(order):
                return self.read(order).targets
            self.read(missing)
        assert self._targets is not None
        rows: Array = self._targets[order]
        return rows

    def keep_targets(self, indices: ArrayLike, targets: Array) -> None:
        """Take targets that another process has read."""
        with self._lock:
            self._keep(np.asarray(indices), targets)

    def _keep(self, order: Array, targets: Array) -> None:
        if self._targets is None:
            self._targets = np.zeros((self.size, *targets.shape[1:]), targets.dtype)
            self._is_known = np.zeros(self.size, np.bool_)
        old = self._targets[order]
        is_changed = (old != targets).reshape(len(order), -1).any(axis=1)
        is_changed &= self._is_known[order]
        if is_changed.any():
            raise DataError(
                "data.not-repeatable",
                f"{self.location}: the target of item {order[is_changed.argmax()]} of {self.name} "
                "differs when it is read again: items must depend on their index alone",
            )
        self._targets[order] = targets
        self._is_known[order] = True

    def _read(self, order: Array) -> ItemRows:
        numbers = [int(index) for index in order]
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(numbers)
        else:
            items = [self.dataset[number] for number in numbers]
        for number, item in zip(numbers, items, strict=True):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise DataError(
                    "data.dataset-item",
                    f"{self.location}: item {number} of {self.name} is no pair: return (sample, "
                    "target), with a tuple as the sample if the model takes several inputs",
                )
        samples, targets = zip(*items, strict=True)
        columns = _columns(samples)
        like = self.first
        inputs = tuple(
            self._stack(column, numbers, None if like is None else like.inputs[position])
            for position, column in enumerate(columns)
        )
        return ItemRows(
            inputs, self._stack(targets, numbers, None if like is None else like.targets)
        )

    def _stack(self, values: Sequence[Any], numbers: Sequence[int], like: Array | None) -> Array:
        """Return values as one array (n, ...), in shape and dtype like those of the first item."""
        if type(values[0]).__module__.startswith("PIL."):
            raise DataError(
                "data.dataset-image",
                f"{self.location}: the items of {self.name} have PIL images: give it the transform "
                "torchvision.transforms.ToTensor()",
            )
        arrays = [_to_array(value) for value in values]
        shape, dtype = (
            (arrays[0].shape, arrays[0].dtype) if like is None else (like.shape[1:], like.dtype)
        )
        for number, array in zip(numbers, arrays, strict=True):
            if array.shape != shape or not np.can_cast(array.dtype, dtype, "same_kind"):
                raise DataError(
                    "data.dataset-shapes",
                    f"{self.location}: items of {self.name} differ: {array.shape} and "
                    f"{array.dtype} in item {number}, {shape} and {dtype} in the first: make them "
                    "equal, for example by a transform",
                )
        return np.stack(arrays).astype(dtype, copy=False)


def _columns(samples: Sequence[Any]) -> list[list[Any]]:
    """Return the values of each input of some samples."""
    if isinstance(samples[0], Mapping):
        return [[sample[key] for sample in samples] for key in samples[0]]
    if isinstance(samples[0], tuple | list):
        return [list(column) for column in zip(*samples, strict=True)]
    return [list(samples)]


def _to_array(value: Any) -> Array:
    if isinstance(value, str | bytes):  # of any length
        return np.array(value, object)
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


@final
class ItemSource(ArraySource):
    """One input of the items.

    Parameters
    ----------
    reader : ItemReader
        Reads the items.
    position : int
        Number of the input.
    """

    by_item = True

    def __init__(self, reader: ItemReader, position: int) -> None:
        assert reader.first is not None
        first = reader.first.inputs[position]
        self.shape, self.dtype = (reader.size, *first.shape[1:]), first.dtype
        self.location = reader.location
        self._reader, self._position = reader, position

    def read(self, indices: ArrayLike) -> Array:
        return self._reader.read(indices).inputs[self._position]

    def read_range(self, start: int, stop: int) -> Array:
        return self.read(np.arange(start, stop))


@final
class ItemTargets(ArraySource):
    """The targets of the items.

    Parameters
    ----------
    reader : ItemReader
        Reads the items.
    classes : int or None
        Number of classes; None: targets are no classes.
    """

    by_item = True

    def __init__(self, reader: ItemReader, classes: int | None = None) -> None:
        assert reader.first is not None
        first = reader.first.targets
        self.shape, self.dtype = (reader.size, *first.shape[1:]), first.dtype
        self.location = reader.location
        self._reader, self._classes = reader, classes

    def read(self, indices: ArrayLike) -> Array:
        targets = self._reader.targets(indices)
        if self._classes is not None and targets.size and targets.max() >= self._classes:
            raise DataError(
                "data.labels-out-of-range",
                f"{self.location}: an item has label {targets.max()}, but classes = "
                f"{self._classes}: give the number of all classes",
            )
        return targets

    def read_range(self, start: int, stop: int) -> Array:
        return self.read(np.arange(start, stop))

    def keep(self, indices: ArrayLike, targets: Array) -> None:
        """Take targets that another process has read."""
        self._reader.keep_targets(indices, targets)
