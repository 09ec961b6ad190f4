"""Notes on class labels: classes without a sample, and classes of very different sizes.

Invariant: labels are read in their order until a deadline. A note is made only if all labels of its
split were read, so that each number in it is exact.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dtrain.data.dataset import Dataset
from dtrain.errors import DataError
from dtrain.tasks.losses import CLASS_LOSSES
from dtrain.tasks.task import Task

Counts = NDArray[np.int64]
"""Labels of each class, (classes,)."""


IMBALANCE = 20
"""Samples of the largest class per sample of the smallest one, from which a note is made."""


LABELS_PER_READ = 2**20


VOID_LABEL = 255
"""The label of pixels that have none, in many data sets of images."""


def label_notes(
    splits: Mapping[str, Dataset], task: Task, sampler: str, deadline: float
) -> Iterator[str]:
    """Yield the notes on the labels of all splits.

    Parameters
    ----------
    task : Task
        The task, which knows its targets.
    sampler : str
        The key of `[data]`; only a uniform one needs a note on the sizes of classes.
    deadline : float
        The time of `time.monotonic` after which nothing more is read.

    Raises
    ------
    DataError
        A label is out of range.
    """
    if task.kind != "classes" or task.loss not in CLASS_LOSSES or task.target == "input":
        return
    train = splits["train"]
    counts = count_labels(train, "train", task, deadline)
    if counts is None or (counts > 0).sum() < 2:  # another note names targets that are all alike
        return
    yield from _missing_notes(train, counts)
    for name, split in splits.items():
        others = None if name == "train" else count_labels(split, name, task, deadline)
        unknown = [] if others is None else np.flatnonzero((others > 0) & (counts == 0)).tolist()
        if unknown:
            yield (
                f"{_classes(train, unknown)} of the {name} split "
                f"{'has' if len(unknown) == 1 else 'have'} no training sample, so the model cannot "
                f"learn {'it' if len(unknown) == 1 else 'them'}: add samples, or split the data "
                "anew"
            )
    if task.class_per_sample and sampler == "uniform":
        yield from _imbalance_notes(train, counts)


def count_labels(split: Dataset, name: str, task: Task, deadline: float) -> Counts | None:
    """Return the labels of each class; None where the deadline came first.

    Raises
    ------
    DataError
        A label is out of range; it names the split and the sample.
    """
    counts = np.zeros(split.classes, np.int64)
    rows = max(1, LABELS_PER_READ // max(1, int(np.prod(split.target_shape))))
    for start in range(0, split.size, rows):
        if time.monotonic() > deadline:
            return None
        labels = split.targets(np.arange(start, min(start + rows, split.size))).numpy()
        is_counted = labels != task.ignore_index
        is_wrong = is_counted & ((labels < 0) | (labels >= split.classes))
        if is_wrong.any():
            place = tuple(np.argwhere(is_wrong)[0])
            raise DataError(
                "data.labels-out-of-range",
                f"label {labels[place]} at sample {start + place[0]} of the {name} split is out of "
                f"range: there are {split.classes} classes, 0 to {split.classes - 1}; correct the "
                "label, or `classes` of the data set",
            )
        counts += np.bincount(labels[is_counted], minlength=split.classes)
    return counts


def _missing_notes(train: Dataset, counts: Counts) -> Iterator[str]:
    """Yield a note if a class has no training sample."""
    missing = np.flatnonzero(counts == 0).tolist()
    if not missing:
        return
    first = int(np.flatnonzero(counts)[0])
    begin = ""
    if missing == list(range(first)):
        begin = f"the labels of the training split start at {first}: "
    cure = 'set [data] labels = "compact"'
    if train.class_labels:
        cure = "add samples, or hold out fewer for the validation"
    elif len(counts) == VOID_LABEL + 1 and VOID_LABEL - 1 in missing:
        cure = (
            f'if {VOID_LABEL} means "no label", set [task] ignore-index = {VOID_LABEL}, else {cure}'
        )
    yield (
        f"{begin}{_classes(train, missing)} of {len(counts):,} "
        f"{'has' if len(missing) == 1 else 'have'} no training sample, so the model cannot "
        f"learn {'it' if len(missing) == 1 else 'them'}: {cure}"
    )


def _imbalance_notes(train: Dataset, counts: Counts) -> Iterator[str]:
    """Yield a note if the largest class is much larger than the smallest."""
    smallest = int(np.where(counts > 0, counts, counts.max() + 1).argmin())
    largest = int(counts.argmax())
    if counts[largest] > IMBALANCE * counts[smallest]:
        yield (
            f"{_classes(train, [largest])} has {counts[largest]:,} training samples and "
            f"{_classes(train, [smallest])} {counts[smallest]:,}: the model may predict only "
            'large classes; set [data] sampler = "balanced" to train on all classes alike'
        )


def _classes(train: Dataset, numbers: Sequence[int]) -> str:
    """Return the names of classes: "class 0", or "4 classes (0, 2, 5, ...)"."""
    labels = train.class_labels
    shown = ", ".join(repr(labels[n]) if labels else str(n) for n in numbers[:3])
    if len(numbers) == 1:
        return f"class {shown}"
    return f"{len(numbers):,} classes ({shown}{', ...' if len(numbers) > 3 else ''})"
