"""Notes on class labels: classes without a sample, and classes of very different sizes."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from dtrain.data.array_source import MemorySource
from dtrain.data.dataset import Dataset
from dtrain.data.label_map import LabelMap, RenumberedLabels
from dtrain.data.label_notes import count_labels, label_notes
from dtrain.data.source_dataset import SourceDataset
from dtrain.errors import DataError
from dtrain.tasks.task import Task
from tests.refusals import refuses


def split(y: Any, classes: int = 4) -> Dataset:
    """Return samples of one number with these labels."""
    y = np.array(y)
    return SourceDataset(MemorySource(np.zeros((len(y), 1))), MemorySource(y), classes)


def notes(y: Any, y_test: Any = (), sampler: str = "uniform", **task: Any) -> list[str]:
    """Return the notes on a training and a test split."""
    splits = {"train": split(y), "test": split(y_test or y)}
    bound = Task(**task).bind(splits["train"].target_shape, splits["train"].target_dtype, 4)
    return list(label_notes(splits, bound, sampler, math.inf))


def test_labels_of_all_classes_need_no_note() -> None:
    assert notes([0, 1, 2, 3, 3]) == []


def test_labels_that_start_at_one_are_named_with_the_key() -> None:
    [note] = notes([1, 2, 3, 3])
    assert all(word in note for word in ("start at 1", "class 0", 'labels = "compact"'))
    [note] = notes([2, 3, 3])
    assert "start at 2" in note


@pytest.mark.parametrize(("y", "named"), [([0, 2, 3], "class 1"), ([0, 3], "2 classes (1, 2)")])
def test_gaps_are_named_with_the_key(y: list[int], named: str) -> None:
    [note] = notes(y)
    assert named in note
    assert 'labels = "compact"' in note
    assert "start at" not in note


def test_the_label_of_pixels_without_one_is_named() -> None:
    y = np.array([[0, 1], [2, 255]])
    train = SourceDataset(MemorySource(np.zeros((2, 1))), MemorySource(y), 256)
    for ignored, count in ((None, 1), (255, 0)):
        task = Task() if ignored is None else Task(ignore_index=ignored)
        split = train if ignored is None else SourceDataset(*train.sources[:2], 3)
        bound = task.bind((2,), train.target_dtype, split.classes)
        found = list(label_notes({"train": split}, bound, "uniform", math.inf))
        assert len(found) == count
        assert all("ignore-index = 255" in note for note in found)


def test_a_class_of_the_test_split_alone_is_named() -> None:
    _, note = notes([0, 1, 2], [0, 3])
    assert "class 3 of the test split" in note
    assert len(notes([0, 1, 2], [0, 2])) == 1


def test_ignored_labels_are_no_class() -> None:
    assert notes([0, 1, 2, 3, 255], ignore_index=255) == []
    assert len(notes([[0, 1], [2, 255]], ignore_index=255)) == 1


def test_classes_of_very_different_sizes_name_the_sampler() -> None:
    """More than twenty times, of the classes that have samples; with one label per sample."""
    small = [0, 1, 2]
    assert notes(small + [3] * 20) == []
    [note] = notes(small + [3] * 21)
    assert all(word in note for word in ("class 3", "class 0", 'sampler = "balanced"'))
    assert notes(small + [3] * 21, sampler="balanced") == []
    assert len(notes([0, 1] + [3] * 21)) == 2
    assert notes([[0, 1], [2, 3], *[[3, 3]] * 50]) == []


def test_a_label_that_is_all_there_is_has_another_note() -> None:
    assert notes([3, 3]) == []


def test_other_targets_are_no_labels() -> None:
    assert notes([1, 2, 3, 3], loss="mse") == notes([0, 1, 1], loss="bce-with-logits") == []
    assert notes([1, 2, 3, 3], loss="tests.task_data:quartic") == []


def test_numbered_labels_are_named_as_stored() -> None:
    """Such a class lost its samples to the validation split."""
    train = RenumberedLabels(split([0, 2, 2]), LabelMap({0, 2, 7}))
    task = Task().bind((), train.target_dtype, 3)
    [note] = label_notes({"train": train}, task, "uniform", math.inf)
    assert "class 7" in note
    assert "compact" not in note


def test_labels_are_counted_part_by_part_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dtrain.data.label_notes.LABELS_PER_READ", 2)
    data, task = split([0, 1, 1, 3, 255]), Task(ignore_index=255)
    counts = count_labels(data, "train", task, math.inf)
    assert counts is not None
    assert counts.tolist() == [1, 2, 0, 1]
    assert count_labels(data, "train", task, time.monotonic() - 1) is None
    for wrong in (4, -1):
        with refuses(DataError, "data.labels-out-of-range") as caught:
            count_labels(split([0, 1, 2, wrong]), "test", Task(), math.inf)
        assert "sample 3 of the test split" in caught.value.message
