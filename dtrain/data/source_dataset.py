"""Splits whose samples and targets come from array sources: arrays, or files of any format.

Invariant: shapes and targets are checked when a split is made; samples are read on first need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dtrain.data.array_source import ArrayForm, ArraySource, LazySource, MemorySource
from dtrain.data.conversion import (
    NUMERIC_KINDS,
    Array,
    stores_integers,
    target_dtype,
    to_float_tensor,
    to_input_tensor,
    to_int_tensor,
    to_summable,
    to_target_tensor,
    torch_dtype,
    value_range,
)
from dtrain.data.dataset import (
    SAMPLES_PER_READ,
    Dataset,
    DatasetSplits,
    InputSpec,
    Label,
    Moments,
    check_splits,
)
from dtrain.data.item_sources import ItemTargets
from dtrain.data.label_map import LabelMap
from dtrain.data.memory_limits import fits_in_memory
from dtrain.data.sample_weights import read_weights
from dtrain.data.sampler import Indices
from dtrain.data.shuffle_windows import StoredPieces
from dtrain.data.targets import TargetForm, TargetScan, to_texts
from dtrain.errors import DataError
from dtrain.tasks.task import DEFAULT_TASK, Task


@final
@dataclass(frozen=True)
class SplitSources:
    """What one split is read from.

    Attributes
    ----------
    location : str
        File or name of a user's function, for messages.
    inputs : tuple of ArraySource
        The samples (n, ...), and further inputs of them.
    targets : ArraySource or None
        The targets (n, ...); None where the input is the target.
    class_names : tuple of str
        Names in the order of the labels, () where unknown.
    moments : Moments or None
        Mean and deviation per channel in the units of the stored samples, where a file holds them.
    weights : ArraySource or None
        Weights of the samples in the training loss, (n,); read for the training split alone.
    """

    location: str
    inputs: tuple[ArraySource, ...]
    targets: ArraySource | None
    class_names: tuple[str, ...] = ()
    moments: Moments | None = None
    weights: ArraySource | None = None


@final
class SourceDataset(Dataset):
    """One split, read from array sources, which keep their dtype and are converted batch by batch.

    A source that is not in memory is read into it on first need where it fits.

    Parameters
    ----------
    inputs : ArraySource or sequence of ArraySource
        The samples (n, ...), and further inputs of them.
    targets : ArraySource
        The targets (n, ...).
    classes : int
        As in `Dataset`.
    value_range : (float, float), optional
        As in `Dataset`; default: 0 ... 1 for bytes.
    class_names, moments
        As in `SplitSources`.
    form : TargetForm, optional
        How stored targets become those of the task; default: they are as they are.
    """

    def __init__(
        self,
        inputs: ArraySource | Sequence[ArraySource],
        targets: ArraySource,
        classes: int,
        *,
        value_range: tuple[float, float] | None = None,
        class_names: tuple[str, ...] = (),
        moments: Moments | None = None,
        form: TargetForm | None = None,
    ) -> None:
        first, *others = (inputs,) if isinstance(inputs, ArraySource) else inputs
        self._samples, self._others, self._labels = first, tuple(others), targets
        self.size, self.shape = first.shape[0], first.shape[1:]
        self.classes, self.class_names = classes, class_names
        self.value_range = value_range or _value_range(first)
        self._form = form or TargetForm(targets.shape[1:], targets.dtype)
        self.target_shape, self.target_dtype = self._form.shape, target_dtype(self._form.dtype)
        self.class_labels = self._form.class_labels
        self.input_dtype = torch_dtype(first.dtype)
        self.other_inputs = tuple(
            InputSpec(other.shape[1:], _input_dtype(other.dtype)) for other in others
        )
        self.stored_pieces = None
        # Whether the pages of a file that is mapped fit in memory depends on the machine.
        is_mapped_file = first.is_mapped and not isinstance(first, MemorySource)
        if is_mapped_file or not (first.in_memory or first.by_item):
            self.stored_pieces = StoredPieces(first.row_bytes, first.chunk_rows, first.compressed)
        self._stored_moments = moments
        self._loads = True

    @property
    def label_map(self) -> LabelMap | None:
        """The numbers of the labels; None where they stay as they are."""
        return self._form.label_map

    @property
    def sources(self) -> tuple[ArraySource, ...]:
        """The samples, the further inputs and the targets."""
        return (self._samples, *self._others, self._labels)

    def use_sources(self, sources: Sequence[ArraySource]) -> None:
        """Read from other sources of the same content, in the order of `sources`."""
        self._samples, *others, self._labels = sources
        self._others = tuple(others)
        self._forget_reads()

    @property
    def stays_on_disk(self) -> bool:
        """Whether the sources that are not in memory are read piece by piece in any case."""
        return not self._loads

    def keep_on_disk(self) -> None:
        """Read the sources that are not in memory piece by piece, although they may fit."""
        self._loads = False
        self._forget_reads()

    def _forget_reads(self) -> None:
        for name in ("slow", "_inputs", "_other_inputs", "_targets"):
            self.__dict__.pop(name, None)

    @property
    def reads_in_threads(self) -> bool:
        return not self._samples.by_item

    @property
    def reads_items(self) -> bool:
        return self._samples.by_item

    def item_targets(self, indices: ArrayLike) -> Tensor | None:
        is_known = not isinstance(self._labels, ItemTargets)
        return None if is_known else torch.from_numpy(self._labels.read(indices))

    def keep_targets(self, indices: Indices, targets: Tensor) -> None:
        if isinstance(self._labels, ItemTargets):
            self._labels.keep(indices, targets.numpy())

    def with_samples(self, wrap: Callable[[ArraySource], ArraySource]) -> SourceDataset:
        if self._samples.by_item:
            return self
        dataset = copy(self)
        dataset._others, dataset._labels = (), MemorySource(np.empty(0, np.int64))
        dataset._samples = wrap(self._inputs)
        dataset.sample_weights = None
        cached = {"slow": self.slow, "_inputs": dataset._samples}
        dataset.__dict__ |= {"_other_inputs": (), "_targets": dataset._labels, **cached}
        return dataset

    @cached_property
    def slow(self) -> bool:
        """Whether the samples are read from files piece by piece; decided on first need."""
        samples = self._samples
        if samples.by_item or samples.in_memory:
            return samples.by_item
        return not (self._loads and fits_in_memory(samples.nbytes))

    @cached_property
    def _inputs(self) -> ArraySource:
        return self._samples if self.slow else _in_memory(self._samples)

    @cached_property
    def _other_inputs(self) -> tuple[ArraySource, ...]:
        return tuple(self._load(other) for other in self._others)

    @cached_property
    def _targets(self) -> ArraySource:
        return self._load(self._labels)

    def _load(self, source: ArraySource) -> ArraySource:
        """Return a source in memory if it may be loaded and fits."""
        return _in_memory_if_it_fits(source) if self._loads else source

    def inputs(self, indices: ArrayLike) -> Tensor:
        return to_float_tensor(self._inputs.read(indices))

    def integer_inputs(self, indices: ArrayLike) -> Tensor:
        if not stores_integers(self.input_dtype):
            return super().integer_inputs(indices)  # an error
        return to_int_tensor(self._inputs.read(indices))

    def read_other_inputs(self, indices: ArrayLike) -> tuple[Tensor, ...]:
        return tuple(to_input_tensor(other.read(indices)) for other in self._other_inputs)

    def targets(self, indices: ArrayLike) -> Tensor:
        return to_target_tensor(self._form.convert(self._targets.read(indices)))

    def read_stored(self, rows: range | NDArray[np.int64]) -> Array:
        source = self.__dict__.get("_inputs", self._samples)  # in memory, if inputs were read
        if isinstance(rows, range):
            return to_summable(source.read_range(rows.start, rows.stop))
        return to_summable(source.read(rows))

    @property
    def chunk_rows(self) -> int | None:
        return self._samples.chunk_rows

    @property
    def given_moments(self) -> Moments | None:
        if self._stored_moments is None:
            return None
        scale = 255.0 if self._samples.dtype == np.uint8 else 1.0
        return self._stored_moments[0] / scale, self._stored_moments[1] / scale


def make_splits(parts: Mapping[str, SplitSources], task: Task = DEFAULT_TASK) -> DatasetSplits:
    """Check all targets and the shapes of the splits and return them; no sample is read.

    Parameters
    ----------
    parts : mapping
        The sources by name of the split: "train", "test" and, where there is one, "validation".
    task : Task
        Decides which targets are legal.

    Raises
    ------
    DataError
        A split is not legal, or does not fit the training split.
    """
    train = make_split(parts["train"], task)
    others = {
        name: make_split(part, task, train) for name, part in parts.items() if name != "train"
    }
    location = " and ".join(dict.fromkeys(part.location for part in parts.values()))
    return check_splits(DatasetSplits(train, **others), location)


def make_split(
    part: SplitSources, task: Task = DEFAULT_TASK, train: SourceDataset | None = None
) -> SourceDataset:
    """Check the sources of one split and return it; all targets are read, but no sample.

    Parameters
    ----------
    part : SplitSources
        The sources.
    task : Task
        Decides which targets are legal.
    train : SourceDataset, optional
        The training split, whose number of classes this one has.

    Raises
    ------
    DataError
        Shape or dtype is not legal, or the split does not fit `train`.
    """
    targets = part.targets if task.target == "data" else None
    if targets is None:
        targets = _no_targets(part)
    scan = TargetScan(targets, part.location, task, None if train is None else train.label_map)
    check_arrays(part.inputs[0], targets, part.location)
    for number, other in enumerate(part.inputs[1:], start=1):
        _check_other(other, number, len(targets), part.location)
    targets = _scan_targets(scan, targets)
    if targets.dtype.kind == "O":  # texts of any length, which other processes cannot map
        targets = MemorySource(to_texts(targets.read_range(0, len(targets))), targets.location)
    if train is None:
        has_names = scan.kind == "classes" and not scan.is_compact
        classes = (len(part.class_names) if has_names else 0) or scan.count_outputs()
    else:
        classes = train.classes
    names = _numbered_names(part.class_names, scan.form.class_labels)
    if train is not None:
        _check_class_names(names, part.location, train)
    scan.check_classes(classes)
    split = SourceDataset(
        part.inputs, targets, classes, class_names=names, moments=part.moments, form=scan.form
    )
    if train is None and part.weights is not None:
        split.sample_weights = read_weights(part.weights, split.size)
    return split


def check_arrays(x: ArrayForm, y: ArrayForm, location: str) -> None:
    """Refuse samples of a wrong shape or dtype, and targets that are not one per sample.

    Parameters
    ----------
    x : ArrayForm
        Samples, (n, channels, ...).
    y : ArrayForm
        Targets, (n, ...).
    location : str
        A file's path or a function's name, for the messages.

    Raises
    ------
    DataError
        No samples, unequal lengths, no dimension of channels, an illegal dtype.
    """
    if x.ndim < 2:
        raise DataError(
            "data.samples-flat", f"{location}: x has shape {x.shape}: give (samples, channels, ...)"
        )
    if x.dtype.kind not in NUMERIC_KINDS:
        raise DataError(
            "data.samples-dtype",
            f"{location}: x has dtype {x.dtype}: convert it to integers, real or complex numbers",
        )
    if len(x) != len(y):
        raise DataError(
            "data.lengths-differ",
            f"{location}: x has {len(x)} samples and y {len(y)} targets: give one per sample",
        )
    if 0 in x.shape:
        raise DataError(
            "data.samples-empty", f"{location}: x has shape {x.shape}: give at least one value"
        )


def _check_other(other: ArraySource, number: int, size: int, location: str) -> None:
    if other.dtype.kind not in NUMERIC_KINDS or len(other) != size:
        raise DataError(
            "data.other-input",
            f"{location}: input {number} has dtype {other.dtype} and {len(other)} samples: "
            f"give numbers, {size} samples as the first input has",
        )


def _scan_targets(scan: TargetScan, targets: ArraySource) -> ArraySource:
    """Check all targets, piece by piece; return them in memory where they fit."""
    targets = _in_memory_if_it_fits(targets)
    if targets.by_item:  # they are checked when they are read
        return targets
    if targets.in_memory and not targets.repeats:
        scan.add(targets.read_range(0, len(targets)))
        return targets
    for start in range(0, len(targets), SAMPLES_PER_READ):
        stop = min(start + SAMPLES_PER_READ, len(targets))
        scan.add(targets.read_range(start, stop), start)
    return targets


def _check_class_names(names: tuple[str, ...], location: str, train: SourceDataset) -> None:
    if train.class_names and names and names != train.class_names:
        raise DataError(
            "data.class-names-differ",
            f"{location} has the {len(names)} classes {_shorten(names)} and the training split the "
            f"{len(train.class_names)} classes {_shorten(train.class_names)}: import both from the "
            "same classes",
        )


def _numbered_names(names: tuple[str, ...], labels: tuple[Label, ...]) -> tuple[str, ...]:
    """Return the names of the classes that labels number, or all names where none is numbered."""
    if not (names and labels):
        return names
    return tuple(
        names[label] if isinstance(label, int) and 0 <= label < len(names) else str(label)
        for label in labels
    )


def _no_targets(part: SplitSources) -> ArraySource:
    """Return one zero per sample, which nothing reads."""
    size = len(part.inputs[0])
    return LazySource((size,), np.int64, lambda: np.zeros(size, np.int64), part.location)


def _in_memory(source: ArraySource) -> ArraySource:
    """Return a source in memory: itself, or one of all its rows."""
    if source.in_memory or source.by_item:
        return source
    rows = source.read_range(0, len(source))
    source.close()
    return MemorySource(rows, source.location)


def _in_memory_if_it_fits(source: ArraySource) -> ArraySource:
    return _in_memory(source) if fits_in_memory(source.nbytes) else source


def _value_range(source: ArraySource) -> tuple[float, float] | None:
    return value_range(source.dtype)


def _input_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return to_input_tensor(np.empty(0, dtype)).dtype


def _shorten(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
