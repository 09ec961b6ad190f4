"""Targets of a data set, checked part by part: labels in range, finite numbers, number of outputs.

Class labels may be stored in several forms, of which `TargetForm.convert` makes one:

====================================================  ==============================
stored                                                labels
====================================================  ==============================
integers of any width, bool                           as they are
a column (n, 1) of integers, for a class loss         (n,)
real numbers (n,) or (n, 1), all whole                int64
texts, under `[data] labels = "compact"`              their places in sorted order
====================================================  ==============================

Invariant: one part is held in memory at a time, so a file's targets may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import numpy as np

from dtrain.data.array_source import ArraySource
from dtrain.data.conversion import Array
from dtrain.data.dataset import Label
from dtrain.data.label_map import LabelMap, distinct_labels, no_labels
from dtrain.errors import DataError, DtrainError
from dtrain.tasks.losses import CLASS_LOSSES
from dtrain.tasks.task import Kind, Task

MAX_CLASSES = 2**24
"""Largest number of classes; a larger label is no class but a name."""


MAX_SUM_ERROR = 0.01
"""Largest difference of the sum of probabilities from 1; halves of 16 bits need some of it."""


NUMBERS_PER_PART = 2**22


TEXT_KINDS = "USOT"
"""Kinds of numpy dtypes that may hold texts."""


@final
@dataclass(frozen=True)
class TargetForm:
    """How stored targets become those that a task takes.

    Attributes
    ----------
    shape : tuple of int
        Shape of one target.
    dtype : numpy.dtype
        Dtype of the targets.
    is_column, has_texts, has_real_labels : bool
        Whether a label is stored as a row (1,), as a text, as a real number.
    label_map : LabelMap or None
        The numbers of the labels; None where they stay as they are.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_column: bool = False
    has_texts: bool = False
    has_real_labels: bool = False
    label_map: LabelMap | None = None

    @property
    def class_labels(self) -> tuple[Label, ...]:
        """The stored label of each class; empty where labels stay."""
        return () if self.label_map is None else self.label_map.labels

    def convert(self, rows: Array) -> Array:
        """Return some stored targets (k, ...) as the task takes them."""
        labels = self.unpack(rows)
        return labels if self.label_map is None else self.label_map.apply(labels)

    def unpack(self, rows: Array) -> Array:
        """Return stored targets in the shape and dtype of the task, but not numbered."""
        labels = rows[:, 0] if self.is_column else rows
        if self.has_texts:
            return to_texts(labels)
        return labels.astype(np.int64) if self.has_real_labels else labels


@final
class TargetScan:
    """The check of all targets of one split, which finds their form.

    Parameters
    ----------
    y : ArraySource
        The targets (n, ...); only shape and dtype are read here, and the first text.
    location : str
        A file's path or a function's name, for the messages.
    task : Task
        Decides which targets are legal, and whether labels are numbered.
    label_map : LabelMap, optional
        The numbers of the labels of the training split, which this split takes over.

    Raises
    ------
    DataError
        The loss cannot have targets of this dtype or these dimensions.
    """

    def __init__(
        self,
        y: ArraySource,
        location: str,
        task: Task,
        label_map: LabelMap | None = None,
    ) -> None:
        self.location, self.task, self._train_map = location, task, label_map
        self.is_compact = task.labels == "compact"
        self.largest_label, self.largest_sample = -1, 0
        self._distinct: set[Label] = set()
        self._form = self._find_form(y)
        is_wide = len(self._form.shape) == 1
        self._is_one_hot = self.kind == "classes" and is_wide and self._has_class_loss

    @property
    def kind(self) -> Kind:
        """The kind of the targets."""
        return self._kind_of(self._form.dtype)

    @cached_property
    def form(self) -> TargetForm:
        """The form of the targets, once all is added."""
        if not self.is_compact:
            return self._form
        label_map = self._train_map or LabelMap(self._distinct, self.task.ignore_index)
        return replace(self._form, label_map=label_map)

    def add(self, part: Array, first_sample: int = 0) -> None:
        """Check some stored targets (k, ...) of the samples from `first_sample` on.

        Raises
        ------
        DataError
            A number is not finite, or a label is negative, no whole number or without a number.
        """
        for start, rows in _cut(part):
            self._add(rows, first_sample + start)

    def _add(self, part: Array, first_sample: int) -> None:
        self._check_finite(part, first_sample)
        if self.kind == "probabilities":
            self._check_probabilities(part, first_sample)
        if self.kind != "classes":
            return
        self._check_whole(part, first_sample)
        try:
            labels = self._form.unpack(part)
        except DtrainError as error:
            raise error.with_prefix(self.location) from error
        if self._is_one_hot:
            self._is_one_hot = _is_one_hot(labels)
        if not self.is_compact:
            self._check_range(labels, first_sample)
        elif self._train_map is None:
            self._distinct |= distinct_labels(labels, self.task.ignore_index)
        else:
            self._train_map.check(labels, self.location, first_sample)

    def count_outputs(self) -> int:
        """Return the number of classes, or of the values per position, once all is added.

        Raises
        ------
        DataError
            No label counts, or labels are one-hot codes.
        """
        if self.kind != "classes":
            is_last = self.kind == "probabilities" and self.task.classes_last
            return self._form.shape[-1 if is_last else 0] if self._form.shape else 1
        if self._is_one_hot:
            raise DataError(
                "data.labels-one-hot",
                f"{self.location}: each sample has {self._form.shape[0]} integers, one of them 1 "
                "and the others 0: give one label per sample, as y.argmax(1), or the same codes as "
                "real numbers, which are probabilities",
            )
        classes = len(self.form.class_labels) if self.is_compact else self.largest_label + 1
        if not classes:
            raise DataError(
                "data.labels-all-ignored",
                f"{self.location}: every label is [task] ignore-index = {self.task.ignore_index}: "
                "give others",
            )
        return len(self.task.class_weights) or classes

    def check_classes(self, classes: int) -> None:
        """Refuse labels of `classes` or more, once all is added.

        Raises
        ------
        DataError
            A label is too large.
        """
        if len(self.form.class_labels) > classes:
            raise DataError(
                "data.labels-out-of-range",
                f"{self.location}: there are {len(self.form.class_labels)} distinct labels, but "
                f"{classes} classes: give one [task] weight per label",
            )
        if self.largest_label >= classes:
            raise DataError(
                "data.labels-out-of-range",
                f"{self.location}: label {self.largest_label} at sample {self.largest_sample} is "
                f"out of range: there are {classes} classes, 0 to {classes - 1}: "
                f"{self._range_cure()}",
            )

    def _range_cure(self) -> str:
        if self.task.class_weights:
            return "give one [task] weight per class"
        return "correct it, add training samples of this class, or name it in the file's classes"

    # ---- forms

    @property
    def _has_class_loss(self) -> bool:
        """Whether the loss is one of torch's over class labels, which have one form alone."""
        return self.task.loss in CLASS_LOSSES

    def _kind_of(self, dtype: np.dtype[Any]) -> Kind:
        return self.task.kind_of(is_integer=dtype.kind in "iub")

    def _find_form(self, y: ArraySource) -> TargetForm:
        """Return the form of the targets, or refuse it."""
        shape, dtype = tuple(y.shape), np.dtype(y.dtype)
        described = f"y has dtype {dtype} and shape {shape}"
        has_texts = bool(shape) and dtype.kind in TEXT_KINDS and _first_is_text(y)
        is_column = self._has_class_loss and shape[1:] == (1,)
        is_flat = len(shape) == 1 or is_column
        has_real_labels = dtype.kind == "f" and self._has_class_loss and is_flat
        if has_texts and self.task.kind_of(is_integer=True) == "classes":
            if not self.is_compact:
                raise DataError(
                    "data.labels-text",
                    f'{self.location}: the labels are texts: set [data] labels = "compact", which '
                    "numbers the classes from 0 in the order of their sorted names",
                )
            dtype = np.dtype(np.int64)
        if not shape or dtype.kind not in "biuf":
            raise DataError(
                "data.targets-dtype",
                f"{self.location}: {described}: give one target of integers or real numbers per "
                "sample",
            )
        if has_real_labels or (self.is_compact and dtype.kind in "iub"):
            dtype = np.dtype(np.int64)
        row_shape = () if is_column else shape[1:]
        self._check_kind(self._kind_of(dtype), row_shape, described)
        return TargetForm(row_shape, dtype, is_column, has_texts, has_real_labels)

    def _check_kind(self, kind: Kind, row_shape: tuple[int, ...], described: str) -> None:
        """Refuse targets of a shape that the loss cannot have."""
        is_real = kind == "probabilities"
        is_wrong = is_real and (not row_shape or self.task.loss != "cross-entropy")
        if is_wrong or (kind == "classes" and row_shape == (1,)):
            raise self._not_integers(described)
        if self.is_compact and kind != "classes":
            raise no_labels(self.location)

    def _not_integers(self, described: str) -> DataError:
        soft = ", or probabilities (samples, classes)" if self.task.loss == "cross-entropy" else ""
        return DataError(
            "data.labels-not-integers",
            f"{self.location}: {described}: give one integer label per sample or position{soft}; "
            'for real numbers set [task] loss, as in loss = "mse"',
        )

    def _check_whole(self, part: Array, first_sample: int) -> None:
        """Refuse real numbers as labels that are not whole."""
        if not self._form.has_real_labels:
            return
        labels = part.ravel()
        is_wrong = labels != np.trunc(labels)
        if is_wrong.any():
            sample = int(np.argmax(is_wrong))
            raise self._not_integers(
                f"the label of sample {first_sample + sample} is {labels[sample]:g}"
            )

    # ---- values

    def _check_finite(self, part: Array, first_sample: int) -> None:
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            sample = first_sample + int(np.argwhere(~np.isfinite(part))[0, 0])
            raise DataError(
                "data.targets-not-finite",
                f"{self.location}: the target of sample {sample} is not finite: correct it, or "
                "remove the sample",
            )
        if part.dtype == np.uint64 and not self.is_compact and (part > MAX_INT64).any():
            place = tuple(np.argwhere(part > MAX_INT64)[0])
            raise DataError(
                "data.targets-too-large",
                f"{self.location}: target {part[place]} of sample {first_sample + place[0]} is "
                "larger than an int64 can be: store targets as int64, if it was a negative number",
            )

    def _check_probabilities(self, part: Array, first_sample: int) -> None:
        """Refuse probabilities of classes that are negative or do not add to 1."""
        axis = -1 if self.task.classes_last else 1
        sums = part.sum(axis, dtype=np.float64)
        is_wrong = np.abs(sums - 1) > MAX_SUM_ERROR
        if not is_wrong.any() and part.min(initial=0) < 0:
            is_wrong = (part < 0).any(axis)
        if not is_wrong.any():
            return
        place = tuple(np.argwhere(is_wrong)[0])
        if part.ndim > 2 and axis == 1 and _add_to_one(part, -1):
            cure = "their last dimension adds to 1: set [task] classes-last = true"
        else:
            cure = (
                "divide them by their sum; for several yes-or-no labels per sample set [task] loss "
                '= "bce-with-logits"; labels per position are integers'
            )
        values = np.moveaxis(part, axis, -1)[place]
        raise DataError(
            "data.probabilities",
            f"{self.location}: the {len(values)} probabilities of sample {first_sample + place[0]} "
            f"add to {sums[place]:g}, the smallest is {values.min():g}: they must not be negative "
            f"and must add to 1: {cure}",
        )

    def _check_range(self, part: Array, first_sample: int) -> None:
        """Refuse negative and very large labels; find the largest one."""
        ignored = self.task.ignore_index
        labels = part.ravel() if ignored is None else part[part != ignored]
        if not labels.size:
            return
        smallest, largest = int(labels.min()), int(labels.max())
        if smallest < 0:
            sample = first_sample + int(np.argwhere(part == smallest)[0, 0])
            raise DataError(
                "data.labels-negative",
                f"{self.location}: label {smallest} at sample {sample} is negative: number the "
                'classes from 0, as [data] labels = "compact" does, or skip such labels by [task] '
                f"ignore-index = {smallest}",
            )
        if largest <= self.largest_label:
            return
        self.largest_label = largest
        self.largest_sample = first_sample + int(np.argwhere(part == largest)[0, 0])
        if largest >= MAX_CLASSES and self._has_class_loss:
            raise DataError(
                "data.labels-too-large",
                f"{self.location}: label {largest} at sample {self.largest_sample} needs a model "
                f"of {largest + 1:,} outputs: number the classes from 0, as [data] labels = "
                '"compact" does',
            )


MAX_INT64 = np.uint64(2**63 - 1)


def _cut(part: Array) -> Iterator[tuple[int, Array]]:
    """Yield targets in parts of at most `NUMBERS_PER_PART` numbers, with their first rows."""
    rows = max(1, NUMBERS_PER_PART // max(1, int(np.prod(part.shape[1:]))))
    for start in range(0, len(part), rows):
        yield start, part[start : start + rows]


def _is_one_hot(labels: Array) -> bool:
    """Return whether each row has a 1 and else zeros, and more than one number."""
    is_one = labels == 1
    return labels.shape[1] > 1 and bool(
        (is_one.sum(1) == 1).all() and (is_one | (labels == 0)).all()
    )


def _add_to_one(part: Array, axis: int) -> bool:
    return bool((np.abs(part.sum(axis, dtype=np.float64) - 1) <= MAX_SUM_ERROR).all())


def _first_is_text(y: ArraySource) -> bool:
    """Return whether the first target is a text."""
    if y.dtype.kind in "UST":
        return True
    return 0 not in y.shape and isinstance(np.ravel(y.read_range(0, 1))[0], str | bytes)


def to_texts(labels: Array) -> Array:
    """Return texts of any numpy dtype as one of kind U; bytes are UTF-8.

    Raises
    ------
    DataError
        A label is no text.
    """
    if labels.dtype.kind == "U":
        return labels
    if labels.dtype.kind == "S":
        return np.char.decode(labels, "utf-8")
    items = [item.decode() if isinstance(item, bytes) else item for item in labels.ravel()]
    for item in items:
        if not isinstance(item, str):
            raise DataError(
                "data.labels-mixed",
                f"some labels are texts, and one is {item!r}: give texts or integers only",
            )
    return np.array(items, dtype=str).reshape(labels.shape)
