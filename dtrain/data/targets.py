"""Targets of a data set, checked part by part: labels in range, finite numbers, number of outputs.

Invariant: one part is held in memory at a time, so a file's targets may be larger than memory.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from dtrain.errors import DataError
from dtrain.tasks.task import Kind, Task

Array = NDArray[Any]


@final
class TargetScan:
    """The check of all targets of one split.

    Parameters
    ----------
    y : array or HDF5 dataset
        The targets (n, ...); only shape and dtype are read here.
    location : str
        A file's path or a function's name, for the messages.
    task : Task
        Decides which targets are legal.

    Raises
    ------
    DataError
        The loss cannot have targets of this dtype or these dimensions.
    """

    def __init__(self, y: Any, location: str, task: Task) -> None:
        self.shape, self.dtype = tuple(y.shape), y.dtype
        self.location, self.task = location, task
        self.largest_label, self.largest_sample = -1, 0
        self._check_dtype()

    @property
    def kind(self) -> Kind:
        """The kind of the targets."""
        return self.task.kind_of(is_integer=self.dtype.kind in "iub")

    def add(self, part: Array, first_sample: int = 0) -> None:
        """Check some targets (k, ...) of the samples from `first_sample` on.

        Raises
        ------
        DataError
            A number is not finite, or a label is negative.
        """
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            sample = first_sample + int(np.argwhere(~np.isfinite(part))[0, 0])
            raise DataError(
                "data.targets-not-finite",
                f"{self.location}: the target of sample {sample} is not finite: correct it, or "
                "remove the sample",
            )
        if self.kind != "classes":
            return
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
                f"classes from 0, or skip such labels by [task] ignore-index = {smallest}",
            )
        if largest > self.largest_label:
            self.largest_label = largest
            self.largest_sample = first_sample + int(np.argwhere(part == largest)[0, 0])

    def count_outputs(self) -> int:
        """Return the number of classes, or of the values per position, once all is added.

        Raises
        ------
        DataError
            No label counts.
        """
        if self.kind != "classes":
            is_last = self.kind == "probabilities" and self.task.classes_last
            return self.shape[-1 if is_last else 1] if len(self.shape) > 1 else 1
        if self.largest_label < 0:
            raise DataError(
                "data.labels-all-ignored",
                f"{self.location}: every label is [task] ignore-index = {self.task.ignore_index}: "
                "give others",
            )
        return len(self.task.class_weights) or self.largest_label + 1

    def check_classes(self, classes: int) -> None:
        """Refuse labels of `classes` or more, once all is added.

        Raises
        ------
        DataError
            A label is too large.
        """
        if self.largest_label >= classes:
            raise DataError(
                "data.labels-out-of-range",
                f"{self.location}: label {self.largest_label} at sample {self.largest_sample} is "
                f"out of range: there are {classes} classes, 0 to {classes - 1}",
            )

    def _check_dtype(self) -> None:
        kind, described = self.kind, f"y has dtype {self.dtype} and shape {self.shape}"
        if not self.shape or self.dtype.kind not in "biuf":
            raise DataError(
                "data.targets-dtype",
                f"{self.location}: {described}: give one target of integers or real numbers per "
                "sample",
            )
        is_real = kind == "probabilities"
        is_wrong = is_real and (len(self.shape) < 2 or self.task.loss != "cross-entropy")
        is_column = kind == "classes" and self.shape[1:] == (1,)
        if is_wrong or is_column or (kind == "classes" and self.dtype.kind == "b"):
            soft = ", or probabilities (samples, classes)" if is_real else ""
            raise DataError(
                "data.labels-not-integers",
                f"{self.location}: {described}: give one integer label per sample or "
                f'position{soft}; for real numbers set [task] loss, as in loss = "mse"',
            )
