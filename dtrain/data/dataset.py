"""Sources: samples by index; inputs and targets apart, since inner stages need only labels.

Invariant: what a source returns depends on the indices alone, never on what was read before; it is
new memory that the caller owns, contiguous and aligned as torch aligns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dtrain.errors import DataError

Array = NDArray[Any]


Moments = tuple[NDArray[np.float64], NDArray[np.float64]]


T = TypeVar("T")


DTYPES = ("uint8", "float16", "float32", "float64")


SAMPLES_PER_READ = 4096


class Dataset(ABC):
    """One split of a data set.

    Attributes
    ----------
    size : int
        Number of samples.
    shape : tuple of int
        Shape of one sample, (C, H, W) or (features,) or another with the channels first.
    classes : int
        Number of classes.
    span : (float, float) or None
        The lowest and the highest value that an input can have, where that is known.
    """

    size: int
    shape: tuple[int, ...]
    classes: int
    value_range: tuple[float, float] | None = None

    @property
    def slow(self) -> bool:
        """Whether inputs come from a disk or a network, so that they are better read ahead.

        They are then read in a thread of its own; a subclass may simply say ``slow = True``.
        """
        return False

    @abstractmethod
    def inputs(self, indices: ArrayLike) -> Tensor:
        """Return samples of shape (n, *shape) in the order of `indices`.

        float32, or float64 where the data are; bytes are scaled from 0 ... 255 to 0 ... 1.
        """

    @abstractmethod
    def targets(self, indices: ArrayLike) -> Tensor:
        """Return labels of shape (n,), int64, 0 <= label < classes, without reading inputs."""

    def to_unit_range(self, x: Tensor) -> Tensor:
        """Return inputs (n, *shape) as they were before anything was done to their values, scaled
        from the `span`, which must be known, to 0 ... 1."""
        assert self.value_range is not None
        low, high = self.value_range
        return ((x - low) / (high - low)).clamp_(0, 1)

    def moments(self) -> Moments:
        """Return mean and standard deviation per channel; by default all inputs are read once."""
        batches = (
            np.arange(i, min(i + SAMPLES_PER_READ, self.size))
            for i in range(0, self.size, SAMPLES_PER_READ)
        )
        return moments(self.inputs(batch).numpy() for batch in batches)


@final
@dataclass(frozen=True)
class DatasetSplits:
    """Two splits of the same samples' shape and classes."""

    train: Dataset
    test: Dataset


@final
class ArrayDataset(Dataset):
    """Arrays in memory, kept as they are (bytes as bytes) and converted batch by batch.

    Parameters
    ----------
    size, shape, classes
        As in `Source`: known before anything is read.
    x : callable
        Returns the samples, (size, *shape), of a dtype in `KINDS`; called on first need.
    y : callable
        Returns the labels, (size,) integers; likewise.
    span : (float, float), optional
        As in `Source`.
    """

    def __init__(
        self,
        size: int,
        shape: tuple[int, ...],
        classes: int,
        x: Callable[[], Array],
        y: Callable[[], Array],
        value_range: tuple[float, float] | None = None,
    ) -> None:
        self.size, self.shape, self.classes, self.value_range = size, shape, classes, value_range
        self._x, self._y = cache(x), cache(y)

    def inputs(self, indices: ArrayLike) -> Tensor:
        return to_float_tensor(self._x()[np.asarray(indices)])

    def targets(self, indices: ArrayLike) -> Tensor:
        return to_int_tensor(self._y()[np.asarray(indices)])


@final
class Standardised(Dataset):
    """Another source's samples, per channel less a mean and over a standard deviation.

    Parameters
    ----------
    source : Source
        Whose samples are standardised.
    known : callable
        Returns the training split's moments; called on first need of inputs, so that a stage that
        needs only labels never asks. A constant channel is left at scale 1.
    """

    def __init__(self, dataset: Dataset, training_moments: Callable[[], Moments]) -> None:
        self.size, self.shape, self.classes = dataset.size, dataset.shape, dataset.classes
        self._dataset, self._training_moments, self.value_range = (
            dataset,
            training_moments,
            dataset.value_range,
        )

    @property
    def slow(self) -> bool:
        """Whether the other source is."""
        return self._dataset.slow

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        mean, deviation = self._training_moments()
        deviation = np.where(deviation > 0, deviation, 1.0)
        # (C,) to (1, C, 1, ...): channels are dim 1 of a batch.
        view = (1, -1, *[1] * (len(self.shape) - 1))
        return torch.from_numpy(mean).view(view), torch.from_numpy(deviation).view(view)

    def inputs(self, indices: ArrayLike) -> Tensor:
        x = self._dataset.inputs(indices)
        mean, deviation = self._scale
        return (x - mean.to(x.dtype)).div_(deviation.to(x.dtype))

    def to_unit_range(self, x: Tensor) -> Tensor:
        mean, deviation = (each.to(x) for each in self._scale)
        return self._dataset.to_unit_range(x * deviation + mean)

    def targets(self, indices: ArrayLike) -> Tensor:
        return self._dataset.targets(indices)


def standardise(data: DatasetSplits) -> DatasetSplits:
    """Standardise both splits with the moments of the training split, which are found once."""
    known = cache(data.train.moments)
    return DatasetSplits(Standardised(data.train, known), Standardised(data.test, known))


def value_range(dtype: Any) -> tuple[float, float] | None:
    """Return the span of samples of a numpy dtype as `floats` gives them: known of bytes."""
    return (0.0, 1.0) if dtype == np.uint8 else None


def moments(batches: Iterable[Array]) -> Moments:
    """Return mean and standard deviation per channel (dim 1) over batches of (n, C, ...).

    Sums are float64 and of differences to the first value of each channel: a constant channel has
    a deviation of exactly 0, and a large mean does not drown a small deviation.
    """
    iterator = iter(batches)
    first, batches = _peek(iterator)
    origin = first[0].reshape(first.shape[1], -1)[:, :1].astype(np.float64)
    number, total, square = 0, np.zeros(len(origin)), np.zeros(len(origin))
    with np.errstate(invalid="ignore"):  # an infinite input shows as a loss that is none
        for batch in batches:
            rows = np.moveaxis(batch, 1, 0).reshape(len(origin), -1) - origin
            number += rows.shape[1]
            total += rows.sum(axis=1)
            square += np.square(rows).sum(axis=1)
    shift = total / number
    variance = np.maximum(square / number - shift**2, 0.0)
    return origin[:, 0] + shift, np.sqrt(variance)


def to_float_tensor(rows: Array) -> Tensor:
    """Return an own tensor of float32 (float64 stays), bytes scaled to 0 ... 1."""
    kind = torch.float64 if rows.dtype == np.float64 else torch.float32
    native = rows.astype(rows.dtype.newbyteorder("="), copy=False)
    x = torch.from_numpy(native).to(kind, copy=True, memory_format=torch.contiguous_format)
    return x.div_(255) if rows.dtype == np.uint8 else x


def to_int_tensor(labels: Array) -> Tensor:
    """Return an own tensor of int64."""
    return torch.from_numpy(labels.astype(np.int64))


def check_arrays(x: Any, y: Array, location: str) -> None:
    """Refuse samples and labels that do not fit each other.

    Parameters
    ----------
    x : array or HDF5 dataset
        Only its shape and dtype are looked at.
    y : array
        Labels.
    where : str
        A file's path or a function's name, for the messages.

    Raises
    ------
    DtrainError
        With code 3: no samples, unequal lengths, no dimension of channels, illegal dtypes, labels
        that are negative.
    """
    if x.ndim < 2:
        raise DataError(
            "todo.key", f"{location}: x has shape {x.shape}: give (samples, channels, ...)"
        )
    if x.dtype.name not in DTYPES:
        raise DataError(
            "todo.key", f"{location}: x has dtype {x.dtype}: convert it to {' or '.join(DTYPES)}"
        )
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(
            "todo.key",
            f"{location}: y has dtype {y.dtype} and shape {y.shape}: give one integer "
            f"label per sample",
        )
    if len(x) != len(y):
        raise DataError(
            "todo.key",
            f"{location}: x has {len(x)} samples and y {len(y)} labels: give one label per sample",
        )
    if 0 in x.shape:
        raise DataError(
            "todo.key", f"{location}: x has shape {x.shape}, so there is nothing to learn from"
        )
    if y.min() < 0:
        raise DataError(
            "todo.key", f"{location}: label {y.min()} at sample {y.argmin()}: labels start at 0"
        )


def check_labels(y: Array, classes: int, location: str) -> None:
    """Refuse a label that is none of the classes."""
    if y.max() >= classes:
        raise DataError(
            "todo.key",
            f"{location}: label {y.max()} at sample {y.argmax()} is out of range: there are "
            f"{classes} classes, 0 to {classes - 1}",
        )


def check_splits(data: DatasetSplits, location: str) -> DatasetSplits:
    """Return `data`, or refuse splits that differ in their samples' shape or classes."""
    train, test = data.train, data.test
    if train.shape != test.shape:
        raise DataError(
            "todo.key",
            f"{location}: training samples have shape {train.shape} and test samples "
            f"{test.shape}: make them equal",
        )
    if train.classes != test.classes:
        raise DataError(
            "todo.key",
            f"{location}: {train.classes} classes in training and {test.classes} in test: "
            f"make them equal",
        )
    return data


def _peek(iterator: Iterator[T]) -> tuple[T, Iterator[T]]:
    """Return the first item, and all items again."""

    def all_() -> Iterator[T]:
        yield first
        yield from iterator

    first = next(iterator)
    return first, all_()
