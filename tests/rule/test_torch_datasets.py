"""Map-style torch Datasets as splits: read by index; a list of labels is used where it is right."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

import dtrain
from dtrain.build import make_plan_together
from dtrain.comm.backends import threads
from dtrain.config.parse import parse_run
from dtrain.data import load_data
from dtrain.data.dataset import DatasetSplits
from dtrain.data.loader import Loader
from dtrain.data.user import as_splits
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import Task
from tests import tiny
from tests.conftest import ROOT
from tests.refusals import refuses

N = 40
X = np.random.default_rng(0).normal(size=(N, 3, 4)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, N)
Y[:3] = (0, 1, 2)


class Items(Dataset[Any]):
    """Pairs of the arrays; reads are recorded."""

    def __init__(self, kind: str = "plain", y: Any = Y) -> None:
        self.kind, self.y = kind, y
        self.reads: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.reads.append(index)
        x = torch.from_numpy(X[index])
        samples = {"plain": x, "pair": (x, x[:1]), "dict": {"image": x, "mask": x[:1]}}
        return samples[self.kind], int(self.y[index])


class Listed(Items):
    """The same, with a list of the labels."""

    def __init__(self, labels: Sequence[int] | None = None) -> None:
        super().__init__()
        self.targets = Y.tolist() if labels is None else labels


def split_of(dataset: Dataset[Any], **keys: Any) -> Any:
    return load_data("data", keys, ROOT, normalise=False, target=(dataset, dataset)).train


@pytest.mark.parametrize("kind", ["plain", "pair", "dict"])
def test_items_are_read_by_index(kind: str) -> None:
    """A micro-batch reads its items once: samples, further inputs and targets."""
    items = Items(kind)
    split = split_of(items, classes=3)
    assert (split.slow, split.size, split.shape, split.classes) == (True, N, (3, 4), 3)
    items.reads.clear()
    batches = [np.array([7, 2, 30]), np.array([1, 7])]
    loader = Loader(split, torch.float64, prefetch=1)
    loader.open(batches, 0)
    for indices in batches:
        assert torch.equal(loader.read(), torch.from_numpy(X[indices]).double())
        others = loader.read_other_inputs(indices)
        assert [other.tolist() for other in others] == [X[indices][:, :1].tolist()] * (
            kind != "plain"
        )
        assert split.targets(indices).tolist() == Y[indices].tolist()
    loader.close()
    assert items.reads == [7, 2, 30, 1, 7]
    assert split.targets(np.array([30, 2])).tolist() == Y[[30, 2]].tolist()
    assert len(items.reads) == 5


@pytest.mark.parametrize("wrap", ["itself", "subset", "both"])
def test_a_list_of_labels_is_used(wrap: str) -> None:
    """A few items are read to compare, through `Subset` and `ConcatDataset`."""
    items, rows = Listed(), list(range(39, 9, -1))
    dataset: Dataset[Any] = items
    expected = Y
    if wrap != "itself":
        dataset, expected = Subset(items, rows), Y[rows]
    if wrap == "both":
        dataset, expected = ConcatDataset([dataset, items]), np.concatenate([expected, Y])
    split = split_of(dataset)
    assert len(set(items.reads)) < N / 2
    assert split.classes == 3
    everything = np.arange(len(expected))
    items.reads.clear()
    assert split.targets(everything).tolist() == expected.tolist()
    assert not items.reads


def test_a_wrong_list_of_labels_is_not_used() -> None:
    for labels in ((Y + 1).tolist(), ["a"] * N, Y[:10].tolist(), [[0]] * 20 + [[0, 1]] * 20):
        split = split_of(Listed(labels))
        assert split.targets(np.arange(N)).tolist() == Y.tolist()
        assert split.classes == 3


def test_without_a_list_all_labels_are_read_once() -> None:
    items = Items()
    splits = as_splits((items, Subset(items, [0])), "data")
    assert set(items.reads) == set(range(N))
    assert splits.test.classes == 3
    items.reads.clear()
    assert splits.train.targets(np.arange(N)).tolist() == Y.tolist()
    assert not items.reads


def test_the_number_of_classes_avoids_the_pass() -> None:
    items = Items()
    split = split_of(items, classes=5)
    assert (set(items.reads), split.classes) == ({0}, 5)
    too_few = split_of(items, classes=1)
    with refuses(DataError, "data.labels-out-of-range"):
        too_few.targets(np.arange(N))
    for wrong in (0, 2.5, "three"):
        with refuses(ConfigError, "data.classes-invalid"):
            split_of(items, classes=wrong)
    with refuses(ConfigError, "run-file.unknown-key"):
        split_of(items, clases=3)


def test_a_target_that_changes_is_refused() -> None:
    items = Items(y=Y.copy())
    split = split_of(items)
    split.inputs(np.arange(9))
    items.y[4] += 1
    with refuses(DataError, "data.not-repeatable"):
        split.inputs(np.arange(3, 9))


def test_targets_that_are_no_classes_need_no_pass() -> None:
    items = Real()
    task = Task.from_table({"loss": "mse"}, ROOT)
    split = as_splits((items, items), "data", task).train
    assert set(items.reads) == {0}
    assert split.targets(np.array([3, 4])).tolist() == np.float32([0.5, 0.5]).tolist()


class Real(Items):
    """A real number as the target."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return super().__getitem__(index)[0], 0.5


def test_tensors_in_memory_are_not_read_by_item() -> None:
    tensors = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    split = split_of(Subset(tensors, range(5, 20)))
    assert not split.slow
    assert torch.equal(split.inputs(np.arange(15)), torch.from_numpy(X[5:20]))
    assert split.targets(np.arange(15)).tolist() == Y[5:20].tolist()


class Odd(Items):
    """Items with one mistake."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        late = {"shape": (x[:1], y), "dtype": (x, 0.5)}
        if self.mistake in late:
            return late[self.mistake] if index == 33 else (x, y)
        return {"triple": (x, y, y), "single": x, "image": (Picture(), y)}[self.mistake]


class Picture:
    """Stands for an image of PIL."""


Picture.__module__ = "PIL.Image"


@pytest.mark.parametrize(
    ("mistake", "key"),
    [
        ("shape", "data.dataset-shapes"),
        ("dtype", "data.dataset-shapes"),
        ("triple", "data.dataset-item"),
        ("single", "data.dataset-item"),
        ("image", "data.dataset-image"),
    ],
)
def test_odd_items_are_refused(mistake: str, key: str) -> None:
    with refuses(DataError, key):
        as_splits((Odd(mistake), Items()), "data")


def test_datasets_without_length_or_items_are_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    for dataset, key in (
        (Stream(), "data.iterable-dataset"),
        (Subset(Items(), []), "data.dataset-empty"),
    ):
        with refuses(DataError, key):
            as_splits((dataset, Items()), "data")


def test_other_processes_get_the_dataset_alone() -> None:
    split = split_of(Items("pair"), classes=3)
    expected = split.inputs(np.arange(9))
    sent = pickle.dumps(split)
    copy = pickle.loads(sent)
    assert torch.equal(copy.inputs(np.arange(9)), expected)
    assert len(sent) < 4000 + pickle.dumps(Items()).__len__()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_pass(ranks: int) -> None:
    """Each rank reads a part of the labels, and all have all of them."""

    def work(comm: threads.Comm) -> tuple[list[int], list[int], int]:
        items = Items()

        def data() -> tuple[Any, Any]:
            return items, Subset(items, range(3, 20))

        table = tiny.run().to_table() | {"mesh": {}, "partition": {}}
        run = parse_run({**table, "data": {"name": data, "normalise": False}}, ROOT / "run.toml")
        plan = make_plan_together(run, comm)
        labels = plan.data.train.targets(np.arange(N)).tolist()
        return items.reads, labels, plan.data.train.classes

    for reads, labels, classes in threads.run_ranks(ranks, work):
        assert (labels, classes) == (Y.tolist(), 3)
        assert len(reads) <= (N + 17) // ranks + 20


def test_the_table_of_datasets() -> None:
    items = Items()
    share = dtrain.data.datasets(
        items, items, validation=0.25, classes=3, workers=2, shuffle="full"
    )
    assert share == {
        "name": (items, items),
        **{"validation": 0.25, "classes": 3, "workers": 2, "shuffle": "full"},
    }
    third = dtrain.data.datasets(items, items, items)
    assert third == {"name": (items, items, items), "workers": 0}
    splits = load_data("data", {}, ROOT, target=third["name"])
    assert isinstance(splits, DatasetSplits)
    assert splits.validation is not None
