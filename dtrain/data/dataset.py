"""Data sets: inputs and targets by index. They are read separately: inner stages need only targets.

Invariant: the result of a read depends only on its indices, never on earlier reads. It is new
memory that the caller owns, contiguous and aligned as torch aligns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dtrain.data.array_source import ArraySource
from dtrain.data.conversion import Array, stores_integers
from dtrain.data.sampler import Indices
from dtrain.data.shuffle_windows import StoredPieces
from dtrain.errors import DataError
from dtrain.node_graph import NodeGraph

Moments = tuple[NDArray[Any], NDArray[np.float64]]
"""Mean and standard deviation per channel, each (channels,); float64, the mean of complex inputs
complex128."""


Label = int | str
"""A class label as the data have it."""


SAMPLES_PER_READ = 4096


class InputSpec(NamedTuple):
    """A further input of a sample: its shape, and its dtype as it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Dataset(ABC):
    """One split of a data set.

    Attributes
    ----------
    size : int
        Number of samples.
    shape : tuple of int
        Shape of one sample, (C, H, W) or (features,) or another with the channels first.
    classes : int
        Number of classes; where targets are no classes, of the values per position.
    target_shape : tuple of int
        Shape of one target: () for a label or a number.
    target_dtype : torch.dtype
        int64 for labels and other integers, else float32 or float64.
    input_dtype : torch.dtype
        Dtype of the stored samples.
    value_range : (float, float) or None
        The lowest and the highest value that an input can have; None where unknown.
    other_inputs : tuple of InputSpec
        Further inputs of a sample (a mask, a second image), as the model takes them.
    class_labels : tuple of (int or str)
        The stored label of each class, where classes have other numbers; else empty.
    sample_weights : array or None
        Weights of the samples in the training loss, (size,) float64; None: all count alike.
    stored_pieces : StoredPieces or None
        How the samples are stored in files; None: in memory, or in an unknown way.
    graph : NodeGraph or None
        The graph whose nodes are the samples, of every split; None: samples have no edges.
    """

    size: int
    shape: tuple[int, ...]
    classes: int
    target_shape: tuple[int, ...] = ()
    target_dtype: torch.dtype = torch.int64
    input_dtype: torch.dtype = torch.float32
    value_range: tuple[float, float] | None = None
    other_inputs: tuple[InputSpec, ...] = ()
    class_labels: tuple[Label, ...] = ()
    sample_weights: NDArray[np.float64] | None = None
    stored_pieces: StoredPieces | None = None
    graph: NodeGraph | None = None

    @property
    def source_size(self) -> int:
        """Number of samples of the data set that this one is a part of; `size` if it is whole."""
        return self.size

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
        """Read the targets at `indices`, as (n, *target_shape) of `target_dtype`, but no inputs;
        labels are 0 <= label < classes."""

    def integer_inputs(self, indices: ArrayLike) -> Tensor:
        """Read the samples at `indices` as they are stored, as int64: neither scaled nor
        standardised.

        Raises
        ------
        DataError
            The data set does not store integers.
        """
        raise _no_integers(self.input_dtype)

    def read_other_inputs(self, indices: ArrayLike) -> tuple[Tensor, ...]:
        """Read the further inputs at `indices`, each (n, *shape): neither scaled nor
        standardised."""
        return ()

    @final
    def read_sample_weights(self, indices: ArrayLike) -> Tensor | None:
        """Return the weights (n,) of samples in the training loss, None where all count alike."""
        if self.sample_weights is None:
            return None
        return torch.from_numpy(self.sample_weights[np.asarray(indices)])

    @property
    def reads_in_threads(self) -> bool:
        """Whether several threads may read samples at the same time."""
        return False

    @property
    def reads_items(self) -> bool:
        """Whether one read of samples also reads their further inputs and their targets, at no
        cost."""
        return False

    def item_targets(self, indices: ArrayLike) -> Tensor | None:
        """Return the targets of items as they are stored; None where all are known without the
        items."""
        return None

    def keep_targets(self, indices: Indices, targets: Tensor) -> None:  # noqa: B027 - optional
        """Take the `item_targets` of another process, so that `targets` need not read the items."""

    def with_samples(self, wrap: Callable[[ArraySource], ArraySource]) -> Dataset:
        """Return the data set for reads of samples alone, from another source of the same content;
        the data set itself, unchanged, if its samples come from no `ArraySource`.

        Parameters
        ----------
        wrap : callable
            Called with the present source; returns the other one.
        """
        return self

    def source_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Return the indices of samples in the data set that this one is a part of."""
        return np.asarray(indices)

    def to_unit_range(self, x: Tensor) -> Tensor:
        """Undo standardisation of inputs (n, *shape) and scale them from `value_range` to 0 ... 1.

        `value_range` must be known.
        """
        assert self.value_range is not None
        low, high = self.value_range
        return ((x - low) / (high - low)).clamp_(0, 1)

    @property
    def chunk_rows(self) -> int | None:
        """Samples of a stored piece that is read as a whole; None where there is none."""
        return None

    @property
    def given_moments(self) -> Moments | None:
        """Mean and deviation per channel of the inputs, where the data come with them."""
        return None

    def read_stored(self, rows: range | NDArray[np.int64]) -> Array:
        """Read samples for statistics, (n, *shape); the caller must not write to them.

        Integers of at most 16 bits come as they are stored, others as `inputs` returns them. A
        range has a step of 1.
        """
        return self.inputs(np.asarray(rows)).numpy()


@final
@dataclass(frozen=True)
class DatasetSplits:
    """Training and test split, with samples of one shape and the same classes.

    Attributes
    ----------
    validation : Dataset, optional
        Samples for decisions during the training, apart from both.
    """

    train: Dataset
    test: Dataset
    validation: Dataset | None = None

    def by_name(self) -> dict[str, Dataset]:
        """Return the splits that are there, by name."""
        splits = {"train": self.train, "test": self.test}
        return splits if self.validation is None else splits | {"validation": self.validation}

    def map(self, function: Callable[[Dataset], Dataset]) -> DatasetSplits:
        """Return the splits with a function applied to each."""
        return DatasetSplits(**{name: function(split) for name, split in self.by_name().items()})

    def as_integers(self) -> DatasetSplits:
        """Return the splits with integer inputs: int64, neither scaled nor standardised.

        Raises
        ------
        DataError
            The samples are not stored as integers.
        """
        return self.map(IntegerInputs)

    def with_input_targets(self) -> DatasetSplits:
        """Return the splits with the inputs themselves as targets."""
        return self.map(InputTargets)


class DatasetView(Dataset):
    """Another data set, some of whose results a subclass changes."""

    def __init__(self, dataset: Dataset) -> None:
        self.size = dataset.size
        self.shape = dataset.shape
        self.classes = dataset.classes
        self.target_shape, self.target_dtype = dataset.target_shape, dataset.target_dtype
        self.input_dtype = dataset.input_dtype
        self.value_range = dataset.value_range
        self.other_inputs = dataset.other_inputs
        self.class_labels = dataset.class_labels
        self.sample_weights = dataset.sample_weights
        self.stored_pieces = dataset.stored_pieces
        self.graph = dataset.graph
        self._dataset = dataset

    @property
    def source_size(self) -> int:
        """That of the other data set."""
        return self._dataset.source_size

    @property
    def base(self) -> Dataset:
        """The other data set."""
        return self._dataset

    @property
    def slow(self) -> bool:
        """Whether the other data set is slow."""
        return self._dataset.slow

    def inputs(self, indices: ArrayLike) -> Tensor:
        return self._dataset.inputs(indices)

    def integer_inputs(self, indices: ArrayLike) -> Tensor:
        return self._dataset.integer_inputs(indices)

    def read_other_inputs(self, indices: ArrayLike) -> tuple[Tensor, ...]:
        return self._dataset.read_other_inputs(indices)

    def targets(self, indices: ArrayLike) -> Tensor:
        return self._dataset.targets(indices)

    @property
    def reads_in_threads(self) -> bool:
        return self._dataset.reads_in_threads

    @property
    def reads_items(self) -> bool:
        return self._dataset.reads_items

    def item_targets(self, indices: ArrayLike) -> Tensor | None:
        return self._dataset.item_targets(indices)

    def keep_targets(self, indices: Indices, targets: Tensor) -> None:
        self._dataset.keep_targets(indices, targets)

    def with_samples(self, wrap: Callable[[ArraySource], ArraySource]) -> Dataset:
        view: DatasetView = object.__new__(type(self))
        view.__dict__ |= self.__dict__
        view._dataset = self._dataset.with_samples(wrap)
        view.sample_weights = None
        return view

    def source_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        return self._dataset.source_indices(indices)

    def read_stored(self, rows: range | NDArray[np.int64]) -> Array:
        return self._dataset.read_stored(rows)

    def to_unit_range(self, x: Tensor) -> Tensor:
        return self._dataset.to_unit_range(x)


@final
class IntegerInputs(DatasetView):
    """Another data set with its inputs as int64, as they are stored.

    Raises
    ------
    DataError
        The samples are not stored as integers.
    """

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        if not stores_integers(dataset.input_dtype):
            raise _no_integers(dataset.input_dtype)
        self.input_dtype = torch.int64
        self.value_range = None

    def inputs(self, indices: ArrayLike) -> Tensor:
        return self._dataset.integer_inputs(indices)


@final
class InputTargets(DatasetView):
    """Another data set whose targets are its inputs."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.target_shape, self.target_dtype = dataset.shape, torch.float32
        self.classes = dataset.shape[0]

    @property
    def reads_items(self) -> bool:
        return False  # the targets of the items are not used

    @property
    def dataset(self) -> Dataset:
        """The other data set."""
        return self._dataset

    def targets(self, indices: ArrayLike) -> Tensor:
        return self._dataset.inputs(indices)


@final
class Subset(DatasetView):
    """Some samples of another data set, in the order of their indices there."""

    def __init__(self, dataset: Dataset, indices: NDArray[np.int64]) -> None:
        super().__init__(dataset)
        self.size = len(indices)
        self._indices = indices
        if dataset.sample_weights is not None:
            self.sample_weights = dataset.sample_weights[indices]

    def source_index(self, index: int) -> int:
        """Return the index of a sample in the other data set; where that is a subset, in its own
        source."""
        source = int(self._indices[index])
        inner = self._dataset
        return inner.source_index(source) if isinstance(inner, Subset) else source

    def source_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        return self._dataset.source_indices(self._indices[np.asarray(indices)])

    def inputs(self, indices: ArrayLike) -> Tensor:
        return self._dataset.inputs(self._indices[np.asarray(indices)])

    def integer_inputs(self, indices: ArrayLike) -> Tensor:
        return self._dataset.integer_inputs(self._indices[np.asarray(indices)])

    def read_stored(self, rows: range | NDArray[np.int64]) -> Array:
        return self._dataset.read_stored(self._indices[np.asarray(rows)])

    def read_other_inputs(self, indices: ArrayLike) -> tuple[Tensor, ...]:
        return self._dataset.read_other_inputs(self._indices[np.asarray(indices)])

    def targets(self, indices: ArrayLike) -> Tensor:
        return self._dataset.targets(self._indices[np.asarray(indices)])

    def item_targets(self, indices: ArrayLike) -> Tensor | None:
        return self._dataset.item_targets(self._indices[np.asarray(indices)])

    def keep_targets(self, indices: Indices, targets: Tensor) -> None:
        self._dataset.keep_targets(self._indices[indices], targets)


def _no_integers(dtype: torch.dtype) -> DataError:
    return DataError(
        "data.inputs-not-integers",
        f"the model takes integers, but the samples are stored as {dtype}: store x as integers",
    )


def check_splits(splits: DatasetSplits, location: str) -> DatasetSplits:
    """Return `splits`, or refuse those that differ in their samples' shape or classes.

    Raises
    ------
    DataError
        Shapes or classes differ.
    """
    if splits.validation is not None:
        check_splits(DatasetSplits(splits.train, splits.validation), f"{location}, validation")
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
    if (train.target_shape, train.target_dtype) != (test.target_shape, test.target_dtype):
        raise DataError(
            "data.splits-targets-differ",
            f"{location}: training targets have shape {train.target_shape} and dtype "
            f"{train.target_dtype}, test targets {test.target_shape} and {test.target_dtype}: make "
            "them equal",
        )
    if train.other_inputs != test.other_inputs:
        raise DataError(
            "data.splits-inputs-differ",
            f"{location}: the further inputs of training and test samples differ: "
            f"{train.other_inputs} and {test.other_inputs}: make them equal",
        )
    return splits
