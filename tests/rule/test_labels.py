"""Class labels in every form in which users store them: read, numbered, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dtrain.data import load_data
from dtrain.data.array_source import MemorySource
from dtrain.data.dataset import DatasetSplits
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.user import as_splits
from dtrain.errors import ConfigError, DataError
from dtrain.planning.plan import make_plan
from dtrain.tasks.task import DEFAULT_TASK, Task
from tests import tiny
from tests.refusals import refuses

LABELS = np.array([0, 2, 1, 1, 0, 2, 2, 0])


def splits(y: Any, y_test: Any = None, task: Task = DEFAULT_TASK, **keys: Any) -> DatasetSplits:
    """Return samples with these targets, from a function of a user."""
    y_test = y if y_test is None else y_test
    task = task.with_labels(keys.pop("labels", "as-stored"))
    x, x_test = np.arange(2.0 * len(y)).reshape(-1, 2), np.arange(2.0 * len(y_test)).reshape(-1, 2)
    return as_splits((x, y, x_test, y_test), "data", task)


def from_files(folder: Path, y: Any, y_test: Any = None, **keys: Any) -> DatasetSplits:
    """Return the same samples, from two files."""
    for name, targets in (("train", y), ("test", y if y_test is None else y_test)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"] = np.arange(2.0 * len(targets)).reshape(-1, 2)
            is_text = isinstance(targets, np.ndarray) and targets.dtype.kind == "U"
            file["y"] = [str(item) for item in targets] if is_text else targets
            for key, value in keys.pop("attributes", {}).items() if name == "train" else ():
                file.attrs[key] = value
    files = {"train": "train.h5", "test": "test.h5"}
    return load_data("hdf5", files, folder, normalise=False, **keys)


def read(split: Any) -> Any:
    """Return all targets of a split."""
    return split.targets(np.arange(split.size)).tolist()


FORMS = ("int8", "uint8", "uint16", "int32", "uint64", ">i2", ">i8", "float16", "float32", ">f8")


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("dtype", FORMS)
def test_labels_of_every_form_are_the_same_labels(
    dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    y = LABELS.astype(dtype).reshape(shape)
    for data in (splits(y), from_files(tmp_path, y), splits(y, LABELS)):
        assert (data.train.classes, data.train.target_shape) == (3, ())
        assert data.train.target_dtype == data.train.targets([0]).dtype == torch.int64
        assert read(data.train) == LABELS.tolist()
        assert read(data.test) == LABELS.tolist()


@pytest.mark.parametrize("y", [LABELS > 0, (LABELS > 0)[:, None], LABELS.reshape(4, 2) > 0])
def test_booleans_are_two_classes(y: np.ndarray) -> None:
    train = splits(y).train
    assert (train.classes, train.target_dtype) == (2, torch.int64)
    assert read(train) == (y[:, 0] if y.shape[1:] == (1,) else y).astype(int).tolist()


def test_a_column_of_numbers_stays_one_for_other_losses() -> None:
    for y in (LABELS[:, None], LABELS[:, None].astype("float32")):
        assert splits(y, task=Task("mse")).train.target_shape == (1,)
    assert splits(LABELS[:, None], task=Task("bce-with-logits")).train.target_shape == (1,)


WRONG: list[tuple[Any, str]] = [
    (LABELS + 0.5, "data.labels-not-integers"),
    (LABELS[:, None] / 2, "data.labels-not-integers"),
    (np.where(LABELS == 2, np.nan, LABELS), "data.targets-not-finite"),
    (LABELS - 1, "data.labels-negative"),
    (LABELS.astype("int8") - np.int8(100), "data.labels-negative"),
    (np.where(LABELS == 2, 2**64 - 1, 0).astype("uint64"), "data.targets-too-large"),
    (LABELS * 10**9, "data.labels-too-large"),
    (np.eye(3, dtype=int)[LABELS], "data.labels-one-hot"),
    (np.eye(3, dtype=bool)[LABELS], "data.labels-one-hot"),
    (np.array(list("acbbacca")), "data.labels-text"),
    (np.array(list("acbbacca")).astype("S"), "data.labels-text"),
    (np.array(list("acbbacca")).astype(object), "data.labels-text"),
    (np.array(["a", 1, "b"] * 3, object), "data.labels-text"),
    (LABELS.astype(complex), "data.targets-dtype"),
    (LABELS.astype("datetime64[s]"), "data.targets-dtype"),
    (np.array([None] * 8), "data.targets-dtype"),
    (np.eye(3)[LABELS] * 2, "data.probabilities"),
    (np.eye(3)[LABELS] + [0.5, -0.5, 0.0], "data.probabilities"),
    (np.stack([LABELS, LABELS], 1) + 1.0, "data.probabilities"),
    (np.eye(3)[LABELS.reshape(4, 2)], "data.probabilities"),
]


@pytest.mark.parametrize(("y", "key"), WRONG)
def test_labels_that_are_ambiguous_or_wrong_are_refused(y: Any, key: str) -> None:
    with refuses(DataError, key):
        splits(y)


def test_the_sample_of_a_wrong_label_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parts a check reads."""
    monkeypatch.setattr("dtrain.data.targets.NUMBERS_PER_PART", 3)
    wrong = {7: LABELS.astype(float), 5: np.eye(3)[LABELS]}
    wrong[7][7], wrong[5][5, 0] = 0.5, 0.7
    for sample, y in wrong.items():
        with pytest.raises(DataError, match=f"sample {sample}"):
            splits(y)


def test_several_labels_of_a_sample_under_a_loss_of_one_name_the_loss() -> None:
    """Binary labels per position need a model with positions; then they train."""
    y = (np.arange(50 * 3).reshape(50, 3) % 7 > 2).astype(int)
    for model in ({"name": "mlp", "widths": [8]}, {"name": "tests.rule.test_labels:three"}):
        with refuses(ConfigError, "task.several-labels"):
            make_plan(tiny.run(data={"name": several(y)}, model=model, partition={"blocks": 1}), 1)
    run = tiny.run(
        data={"name": several(y)},
        model={"name": "mlp", "widths": [8]},
        partition={"blocks": 1},
        task__loss="bce-with-logits",
        objective__name="backprop",
    )
    assert make_plan(run, 1).data.train.classes == 3


def three(shape: tuple[int, ...]) -> torch.nn.Sequential:
    """Return a net with three outputs."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 3))


def several(y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return samples of 2 x 5 numbers with these targets."""
    x = np.random.default_rng(0).normal(size=(len(y), 2, 5))
    return x, y, x[:17], y[:17]


# Compact numbers


NAMES = np.array(["no", "yes", "maybe"])[LABELS]

STORED: list[tuple[Any, tuple[Any, ...]]] = [
    (LABELS + 1, (1, 2, 3)),
    (LABELS * 5 - 5, (-5, 0, 5)),
    (LABELS.astype("float32") * 2, (0, 2, 4)),
    ((LABELS * 10**9)[:, None], (0, 10**9, 2 * 10**9)),
    (LABELS.astype(">i4") + 7, (7, 8, 9)),
    (np.array([2**63, 2**64 - 1, 5], "uint64")[LABELS], (5, 2**63, 2**64 - 1)),
    (LABELS == 2, (0, 1)),
    (np.stack([LABELS * 3, LABELS], 1), (0, 1, 2, 3, 6)),
    (NAMES, ("maybe", "no", "yes")),
    (NAMES.astype("S"), ("maybe", "no", "yes")),
    (NAMES.astype(object), ("maybe", "no", "yes")),
]


@pytest.mark.parametrize(("y", "labels"), STORED)
def test_compact_labels_are_their_places_in_sorted_order(
    y: np.ndarray, labels: tuple[Any, ...], tmp_path: Path
) -> None:
    plain = y[:, 0] if y.shape[1:] == (1,) else y
    stored = np.array([item.decode() if isinstance(item, bytes) else item for item in plain.flat])
    expected = np.searchsorted(np.array(labels), stored.reshape(plain.shape)).tolist()
    for data in (splits(y, labels="compact"), from_files(tmp_path, y, labels="compact")):
        assert data.train.class_labels == data.test.class_labels == labels
        assert data.train.classes == data.test.classes == len(labels)
        assert data.train.targets([0]).dtype == torch.int64
        assert read(data.train) == read(data.test) == expected


def test_a_label_without_a_training_sample_has_no_number(tmp_path: Path) -> None:
    y_test = np.array([1, 3, 4])
    for open_splits in (splits, lambda *args, **keys: from_files(tmp_path, *args, **keys)):
        with refuses(DataError, "data.labels-unknown") as caught:
            open_splits(LABELS + 1, y_test, labels="compact")
        assert "label 4 of sample 2" in caught.value.message
        with refuses(DataError, "data.labels-unknown") as caught:
            open_splits(NAMES, np.array(["no", "never"]), labels="compact")
        assert "'never' of sample 1" in caught.value.message


def test_texts_and_numbers_have_no_common_order() -> None:
    with refuses(DataError, "data.labels-mixed") as caught:
        splits(np.array(["a", 1, "b"], object), labels="compact")
    assert caught.value.message.startswith("data, train: ")


def test_labels_that_do_not_count_stay_and_are_no_class() -> None:
    y = np.where(LABELS == 0, 255, LABELS * 4)
    train = splits(y, task=Task(ignore_index=255), labels="compact").train
    assert train.class_labels == (4, 8)
    assert read(train) == [{255: 255, 4: 0, 8: 1}[label] for label in y]
    with refuses(DataError, "data.compact-ignore-index"):
        splits(LABELS, task=Task(ignore_index=0), labels="compact")
    with refuses(DataError, "data.labels-all-ignored"):
        splits(LABELS * 0, task=Task(ignore_index=0), labels="compact")


def test_class_weights_are_those_of_the_numbers() -> None:
    assert splits(LABELS + 1, task=Task(weight=(1, 2, 3)), labels="compact").train.classes == 3
    with refuses(DataError, "data.labels-out-of-range"):
        splits(LABELS + 1, task=Task(weight=(1, 2)), labels="compact")


def test_names_of_a_file_follow_their_labels(tmp_path: Path) -> None:
    attributes = {"classes": list("abcdef")}
    train: Any = from_files(tmp_path, LABELS * 2 + 1, labels="compact", attributes=attributes).train
    assert (train.class_names, train.classes) == (("b", "d", "f"), 3)


def test_targets_that_are_no_labels_have_no_compact_numbers() -> None:
    with refuses(DataError, "data.compact-without-labels"):
        splits(np.eye(3)[LABELS], labels="compact")
    for task in ({"loss": "mse"}, {"loss": "bce-with-logits"}, {"target": "input"}):
        with refuses(ConfigError, "data.compact-without-classes"):
            tiny.run(data__labels="compact", task=task)


def test_splits_of_a_user_are_numbered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part; a map that is made twice is made once."""
    monkeypatch.setattr("dtrain.data.label_map.SAMPLES_PER_READ", 3)
    x = np.zeros((8, 2))
    labels = LABELS * 3, LABELS * 3 + 1, LABELS[:3] * 3
    *own, test = (
        SourceDataset(MemorySource(x[: len(y)]), MemorySource(y), classes=9) for y in labels
    )
    data = load_data("", {}, tmp_path, labels="compact", target=DatasetSplits(own[0], test))
    assert (data.train.classes, data.train.class_labels) == (3, (0, 3, 6))
    assert (read(data.train), read(data.test)) == (LABELS.tolist(), LABELS[:3].tolist())
    with refuses(DataError, "data.labels-unknown") as caught:
        load_data("", {}, tmp_path, labels="compact", target=DatasetSplits(*own))
    assert "label 1 of sample 0" in caught.value.message


def test_the_map_is_made_before_samples_are_held_out(tmp_path: Path) -> None:
    """The one sample of a class may be in either part."""
    y, held_out = np.append(LABELS + 1, 9), set()
    for seed in range(8):
        data = load_data(
            "", {}, tmp_path, labels="compact", validation=0.4, seed=seed, target=several(y)
        )
        assert data.validation is not None
        assert data.validation.class_labels == data.train.class_labels == (1, 2, 3, 9)
        held_out |= set(read(data.validation))
    assert 3 in held_out


def test_labels_as_stored_are_left_out_of_a_resolved_run() -> None:
    assert "labels" not in tiny.run().to_table()["data"]
    assert tiny.run(data__labels="as-stored").to_table() == tiny.run().to_table()
    assert json.loads(json.dumps(tiny.run(data__labels="compact").to_table()))["data"]["labels"]
