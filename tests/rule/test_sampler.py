"""Samplers: how often samples are drawn, in which order, and which weights are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dtrain.data.array_source import ArraySource, ConcatenatedSource, MemorySource
from dtrain.data.dataset import Dataset, DatasetSplits, Subset
from dtrain.data.hdf5_source import Hdf5Source
from dtrain.data.hold_out import hold_out
from dtrain.data.sampler import DrawWeights, draw_samples, epoch_order
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.weights import make_draws
from dtrain.errors import ConfigError, DataError
from dtrain.planning.plan import make_plan
from dtrain.tasks.task import Task
from tests import tiny
from tests.refusals import refuses

LABELS = np.repeat([0, 1, 2], [70, 25, 5])
SKEWED = np.linspace(0, 4, 100) ** 2


def split(labels: np.ndarray = LABELS) -> Dataset:
    """Return samples whose only number is their index."""
    x = np.arange(float(len(labels)))[:, None]
    return SourceDataset(MemorySource(x), MemorySource(labels), int(labels.max()) + 1)


def drawn(sampler: Any, epoch: int = 0, seed: int = 0, shuffle: str = "full") -> np.ndarray:
    return epoch_order(100, seed, epoch, shuffle, 10, 3, make_draws(sampler, split(), Task()))


def test_the_default_is_the_permutation() -> None:
    assert make_draws("uniform", split(), Task()) is None
    assert np.array_equal(drawn("uniform"), epoch_order(100, 0, 0))


@pytest.mark.parametrize("shuffle", ["full", "chunks"])
def test_equal_weights_draw_every_sample_once(shuffle: str) -> None:
    for weight in (1.0, 1 / 3, 1e-300):
        order = drawn(np.full(100, weight), epoch=5, shuffle=shuffle)
        assert np.array_equal(np.sort(order), np.arange(100))


@pytest.mark.parametrize("weights", [SKEWED, SKEWED > 3, np.eye(100)[7], np.arange(100)])
def test_a_sample_occurs_as_often_as_expected_up_to_one(weights: np.ndarray) -> None:
    expected = 100 * weights / weights.sum()
    for epoch in range(20):
        counts = np.bincount(drawn(weights, epoch), minlength=100)
        assert counts.sum() == 100
        assert (np.abs(counts - expected) < 1 + 1e-9).all()
        assert not counts[weights == 0].any()


def test_the_mean_over_epochs_is_the_expected_number() -> None:
    counts = sum(np.bincount(drawn(SKEWED, epoch), minlength=100) for epoch in range(2000))
    assert np.abs(counts / 2000 - 100 * SKEWED / SKEWED.sum()).max() < 0.06


def test_samples_are_drawn_independently_of_their_neighbours() -> None:
    """Two samples that are expected half a time occur together in about a quarter of the epochs:
    their order is drawn anew in each."""
    half = np.repeat([1.0, 3.0], 50)
    chosen = np.stack([np.bincount(drawn(half, e), minlength=100)[:50] for e in range(400)])
    together = chosen.T @ chosen / 400
    np.fill_diagonal(together, 0.25)
    assert np.abs(together - 0.25).max() < 0.12


def test_classes_are_balanced_in_every_epoch() -> None:
    for epoch in range(20):
        counts = np.bincount(LABELS[drawn("balanced", epoch)])
        assert sorted(counts) == [33, 33, 34]


def test_a_class_is_balanced_over_its_own_samples() -> None:
    counts = np.bincount(drawn("balanced"), minlength=100)
    assert set(counts[95:]) <= {6, 7}
    assert set(counts[70:95]) <= {1, 2}
    assert set(counts[:70]) <= {0, 1}


def test_the_order_is_pure_in_seed_and_epoch() -> None:
    first = drawn(SKEWED, 3, 7)
    assert np.array_equal(first, drawn(SKEWED.copy(), 3, 7))
    for other in (drawn(SKEWED, 4, 7), drawn(SKEWED, 3, 8)):
        assert (first == other).mean() < 0.2
    weights = DrawWeights(np.array([1.0, 2, 0, 5]), np.zeros(4))
    assert draw_samples(weights, 0, 0).tolist() == [0, 1, 3, 3]
    assert epoch_order(4, 0, 0, draws=weights).tolist() == [3, 0, 1, 3]


def test_draws_are_read_in_long_pieces() -> None:
    order = drawn(SKEWED, shuffle="chunks") // 10
    windows = [set(order[start : start + 10]) for start in range(0, 100, 10)]
    assert max(map(len, windows)) <= 6  # of a window, or of two
    assert np.mean([len(set(drawn(SKEWED)[s : s + 10] // 10)) for s in range(0, 100, 10)]) > 4


@pytest.mark.parametrize("kind", ["memory", "parts", "hdf5"])
def test_sources_read_repeated_rows(kind: str, tmp_path: Path) -> None:
    rows = np.arange(20.0).reshape(10, 2)
    source: ArraySource = MemorySource(rows)
    if kind == "parts":
        source = ConcatenatedSource([MemorySource(rows[:4]), MemorySource(rows[4:])], "parts")
    if kind == "hdf5":
        with h5py.File(tmp_path / "rows.h5", "w") as file:
            file.create_dataset("x", data=rows, chunks=(3, 2))
        source = Hdf5Source(tmp_path / "rows.h5", "x")
    order = epoch_order(10, 0, 0, draws=DrawWeights(np.arange(10.0) ** 4, np.zeros(10)))
    assert len(set(order.tolist())) < 8
    assert np.array_equal(source.read(order), rows[order])


def test_a_function_takes_the_targets() -> None:
    def rare(targets: np.ndarray) -> Any:
        assert targets.tolist() == LABELS.tolist()
        return torch.from_numpy(1.0 * (targets == 2))

    assert np.bincount(LABELS[drawn(rare)], minlength=3).tolist() == [0, 0, 100]


def test_weights_are_those_of_the_samples_before_some_are_held_out() -> None:
    splits = hold_out(DatasetSplits(split(), split()), 0.2, 0, Task())
    weights = np.arange(100) % 2
    order = epoch_order(80, 0, 0, draws=make_draws(weights, splits.train, Task()))
    assert (splits.train.inputs(order) % 2 == 1).all()
    balanced = make_draws("balanced", splits.train, Task())
    labels = splits.train.targets(epoch_order(80, 0, 0, draws=balanced)).numpy()
    assert np.ptp(np.bincount(labels)) <= 1


@pytest.mark.parametrize(
    ("weights", "key"),
    [
        (np.ones(99), "data.weights-shape"),
        (np.ones((100, 1)), "data.weights-shape"),
        (["a"] * 100, "data.weights-shape"),
        (-np.eye(100)[3], "data.weights-invalid"),
        (np.where(np.arange(100) == 3, np.nan, 1), "data.weights-invalid"),
        (np.where(np.arange(100) == 3, np.inf, 1), "data.weights-invalid"),
        (np.zeros(100), "data.weights-all-zero"),
    ],
)
def test_weights_that_are_refused(weights: Any, key: str) -> None:
    with refuses(DataError, key):
        make_draws(weights, split(), Task())
    with refuses(DataError, key):
        make_draws(lambda targets: weights, split(), Task())


def test_weights_that_are_all_held_out_are_refused() -> None:
    part = Subset(split(), np.arange(50))
    with refuses(DataError, "data.weights-all-zero"):
        make_draws(1.0 * (np.arange(100) >= 50), part, Task())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data__sampler": "balance"}, "sampler.unknown"),
        ({"data__sampler": "nowhere:weights"}, "user-code.no-module"),
        (
            {
                "data__sampler": "balanced",
                "data__name": "tests.task_data:numbers",
                "task__loss": "mse",
            },
            "data.sampler-needs-labels",
        ),
        (
            {"data__sampler": "balanced", "task__target": "input", "task__loss": "mse"},
            "data.sampler-needs-labels",
        ),
        (
            {"data__sampler": "tests.tiny:run", "task__target": "input", "task__loss": "mse"},
            "data.sampler-needs-targets",
        ),
        ({"data__sampler": "balanced", "task__ignore_index": 1}, "data.sampler-needs-labels"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(changes: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        _ = make_plan(tiny.run(objective__name="backprop", **changes), 1).draws


def test_the_resolved_run_has_a_sampler_only_where_one_is_set() -> None:
    assert "sampler" not in tiny.run(data__sampler="uniform").to_table()["data"]
    assert tiny.run(data__sampler="balanced").to_table()["data"]["sampler"] == "balanced"
