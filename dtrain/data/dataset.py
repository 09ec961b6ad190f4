"""Data sets: inputs and targets by index. They are read separately: inner stages need only labels.

Invariant: the result of a read depends only on its indices, never on earlier reads. It is new
memory that the caller owns, contiguous and aligned as torch aligns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import Any, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dtrain.errors import DataError

Array = NDArray[Any]


Moments = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Mean and standard deviation per channel, each (channels,)."""


DTYPES = ("uint8", "float16", "float32", "float64")
"""Dtypes that stored samples may have."""


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
    value_range : (float, float) or None
        The lowest and the highest value that an input can have; None where unknown.
    """

    size: int
    shape: tuple[int, ...]
    classes: int
    value_range: tuple[float, float] | None = None

    @property
    def slow(self) -> bool:
        """Whether inputs are read from a disk or a network, so that a thread reads them ahead.

        A subclass may set the class attribute ``slow = True``.
        """
        return False

    @abstractmethod
    def inputs(self, indices: ArrayLike) -> Tensor:
        """Read the samples at `indices`, in their order, as (n, *shape).

        float32, or float64 where the data are; bytes are scaled from 0 ... 255 to 0 ... 1. The
        loader may call it in another thread than `targets`, at the same time.
        """

    @abstractmethod
    def targets(self, indices: ArrayLike) -> Tensor:
        """Read the labels at `indices`, as (n,) int64, 0 <= label < classes, but no inputs."""

    def to_unit_range(self, x: Tensor) -> Tensor:
        """Undo standardisation of inputs (n, *shape) and scale them from `value_range` to 0 ... 1.

        `value_range` must be known.
        """
        assert self.value_range is not None
        low, high = self.value_range
        return ((x - low) / (high - low)).clamp_(0, 1)

    def moments(self) -> Moments:
        """Compute mean and standard deviation per channel, by reading all inputs once."""
        batches = (
            np.arange(i, min(i + SAMPLES_PER_READ, self.size))
            for i in range(0, self.size, SAMPLES_PER_READ)
        )
        return moments(self.inputs(batch).numpy() for batch in batches)


@final
@dataclass(frozen=True)
class DatasetSplits:
    """Training and test split, with samples of one shape and the same classes."""

    train: Dataset
    test: Dataset


@final
class ArrayDataset(Dataset):
    """Arrays in memory, which keep their dtype and are converted batch by batch.

    Parameters
    ----------
    size, shape, classes
        As in `Dataset`: known before anything is read.
    x : callable
        Returns the samples, (size, *shape), of a dtype in `DTYPES`; called on first need.
    y : callable
        Returns the labels, (size,) integers; called on first need.
    value_range : (float, float), optional
        As in `Dataset`.
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
        self.size = size
        self.shape = shape
        self.classes = classes
        self.value_range = value_range
        self._x, self._y = cache(x), cache(y)

    def inputs(self, indices: ArrayLike) -> Tensor:
        return to_float_tensor(self._x()[np.asarray(indices)])

    def targets(self, indices: ArrayLike) -> Tensor:
        return to_int_tensor(self._y()[np.asarray(indices)])


@final
class Standardised(Dataset):
    """Another data set, standardised per channel: (x - mean) / standard deviation.

    Parameters
    ----------
    dataset : Dataset
        The samples to standardise.
    training_moments : callable
        Returns the training split's moments. It is called on first need of inputs, hence never on
        a stage that needs only labels. A constant channel is left at scale 1.
    """

    def __init__(self, dataset: Dataset, training_moments: Callable[[], Moments]) -> None:
        self.size = dataset.size
        self.shape = dataset.shape
        self.classes = dataset.classes
        self.value_range = dataset.value_range
        self._dataset = dataset
        self._training_moments = training_moments

    @property
    def slow(self) -> bool:
        """Whether the other data set is slow."""
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

    def statistics(self) -> dict[str, Tensor]:
        """Return mean and standard deviation, each (channels, 1, ...), as they are applied."""
        mean, deviation = self._scale
        return {"mean": mean[0], "std": deviation[0]}

    def use_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Standardise by other statistics, as `statistics` returned them."""
        self.__dict__["_scale"] = statistics["mean"][None], statistics["std"][None]

    def to_unit_range(self, x: Tensor) -> Tensor:
        mean, deviation = (statistic.to(x) for statistic in self._scale)
        return self._dataset.to_unit_range(x * deviation + mean)

    def targets(self, indices: ArrayLike) -> Tensor:
        return self._dataset.targets(indices)


def unstandardised(split: Dataset) -> Dataset:
    """Return the data set that a `Standardised` reads, or the split itself."""
    return split._dataset if isinstance(split, Standardised) else split


def standardise(splits: DatasetSplits) -> DatasetSplits:
    """Standardise both splits with the moments of the training split, computed once."""
    training_moments = cache(splits.train.moments)
    return DatasetSplits(
        Standardised(splits.train, training_moments), Standardised(splits.test, training_moments)
    )


def value_range(dtype: Any) -> tuple[float, float] | None:
    """Return the range of `to_float_tensor` for a numpy dtype: 0 ... 1 for bytes, else None."""
    return (0.0, 1.0) if dtype == np.uint8 else None


def moments(batches: Iterable[Array]) -> Moments:
    """Compute mean and standard deviation per channel (dim 1) over batches of (n, C, ...).

    Float64 sums of the differences to each channel's first value: a constant channel has a
    deviation of exactly 0, and a small deviation is not lost beside a large mean.
    """
    iterator = iter(batches)
    first = next(iterator)
    origin = first[0].reshape(first.shape[1], -1)[:, :1].astype(np.float64)
    count = 0
    total = np.zeros(len(origin))
    square = np.zeros(len(origin))
    with np.errstate(invalid="ignore"):  # an infinite input is reported later, as the loss it gives
        for batch in chain([first], iterator):
            values = np.moveaxis(batch, 1, 0).reshape(len(origin), -1) - origin
            count += values.shape[1]
            total += values.sum(axis=1)
            square += np.square(values).sum(axis=1)
    shift = total / count
    variance = np.maximum(square / count - shift**2, 0.0)
    return origin[:, 0] + shift, np.sqrt(variance)


def to_float_tensor(rows: Array) -> Tensor:
    """Copy samples to a tensor of float32 (float64 stays); scale bytes to 0 ... 1."""
    dtype = torch.float64 if rows.dtype == np.float64 else torch.float32
    native = rows.astype(rows.dtype.newbyteorder("="), copy=False)
    x = torch.from_numpy(native).to(dtype, copy=True, memory_format=torch.contiguous_format)
    return x.div_(255) if rows.dtype == np.uint8 else x


def to_int_tensor(labels: Array) -> Tensor:
    """Copy labels to a tensor of int64."""
    return torch.from_numpy(labels.astype(np.int64))


def check_arrays(x: Any, y: Array, location: str) -> None:
    """Refuse samples and labels that do not fit each other.

    Parameters
    ----------
    x : array or HDF5 dataset
        Samples, (n, channels, ...); only shape and dtype are read.
    y : array
        Labels, (n,).
    location : str
        A file's path or a function's name, for the messages.

    Raises
    ------
    DataError
        No samples, unequal lengths, no dimension of channels, an illegal dtype, a negative label.
    """
    if x.ndim < 2:
        raise DataError(
            "data.samples-flat", f"{location}: x has shape {x.shape}: give (samples, channels, ...)"
        )
    if x.dtype.name not in DTYPES:
        raise DataError(
            "data.samples-dtype",
            f"{location}: x has dtype {x.dtype}: convert it to {' or '.join(DTYPES)}",
        )
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(
            "data.labels-not-integers",
            f"{location}: y has dtype {y.dtype} and shape {y.shape}: give one integer "
            f"label per sample",
        )
    if len(x) != len(y):
        raise DataError(
            "data.lengths-differ",
            f"{location}: x has {len(x)} samples and y {len(y)} labels: give one label per sample",
        )
    if 0 in x.shape:
        raise DataError(
            "data.samples-empty", f"{location}: x has shape {x.shape}: give at least one value"
        )
    if y.min() < 0:
        raise DataError(
            "data.labels-negative",
            f"{location}: label {y.min()} at sample {y.argmin()} is negative: number the classes "
            f"from 0",
        )


def check_labels(y: Array, classes: int, location: str) -> None:
    """Refuse labels (n,) of `classes` or more.

    Raises
    ------
    DataError
        A label is too large.
    """
    if y.max() >= classes:
        raise DataError(
            "data.labels-out-of-range",
            f"{location}: label {y.max()} at sample {y.argmax()} is out of range: there are "
            f"{classes} classes, 0 to {classes - 1}",
        )


def check_splits(splits: DatasetSplits, location: str) -> DatasetSplits:
    """Return `splits`, or refuse those that differ in their samples' shape or classes.

    Raises
    ------
    DataError
        Shapes or classes differ.
    """
    train, test = splits.train, splits.test
    if train.shape != test.shape:
        raise DataError(
            "data.splits-shapes-differ",
            f"{location}: training samples have shape {train.shape} and test samples "
            f"{test.shape}: make them equal",
        )
    if train.classes != test.classes:
        raise DataError(
            "data.splits-classes-differ",
            f"{location}: {train.classes} classes in training and {test.classes} in test: "
            f"make them equal",
        )
    return splits
