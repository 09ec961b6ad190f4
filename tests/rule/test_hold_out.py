"""Validation samples held out of the training split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dtrain.data import load_data
from dtrain.data.dataset import DatasetSplits
from dtrain.data.hold_out import hold_out
from dtrain.data.statistics import Standardised, standardise
from dtrain.data.user import as_splits
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import DEFAULT_TASK, Task
from tests.refusals import refuses

SIZES = (50, 30, 7)
"""Samples of each class."""


def splits(**changes: Any) -> DatasetSplits:
    """Return samples whose first number is their index in the training split."""
    y = np.repeat(np.arange(3), SIZES)
    x = np.stack([np.arange(len(y)), np.sin(np.arange(len(y)))], 1).astype(np.float32)
    return as_splits((x, y, x[:5], y[:5]), "test", **changes)


def members(split: Any) -> list[int]:
    """Return the indices of the samples of a split in the whole training split."""
    return [int(i) for i in split.inputs(np.arange(split.size))[:, 0]]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_every_class_gives_its_share_once(share: float) -> None:
    result = hold_out(splits(), share, 0, DEFAULT_TASK)
    assert result.validation is not None
    held_out, rest = members(result.validation), members(result.train)
    assert sorted(held_out + rest) == list(range(sum(SIZES)))
    assert len(held_out) == round(share * sum(SIZES))
    labels = result.validation.targets(np.arange(len(held_out)))
    for label, size in enumerate(SIZES):
        assert abs(int((labels == label).sum()) - share * size) <= 1
    assert result.test.size == 5


def test_the_samples_are_pure_in_the_seed() -> None:
    drawn = [members(hold_out(splits(), 0.3, seed, DEFAULT_TASK).validation) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_numbers_as_targets_are_drawn_without_classes() -> None:
    task = Task("mse")
    y = np.linspace(0, 1, 40, dtype=np.float32)
    x = y[:, None]
    result = hold_out(as_splits((x, y, x, y), "test", task), 0.25, 0, task)
    assert result.validation is not None
    assert (result.train.size, result.validation.size) == (30, 10)


def test_statistics_are_those_of_the_remaining_samples() -> None:
    result = standardise(hold_out(splits(), 0.3, 0, DEFAULT_TASK))
    assert isinstance(result.validation, Standardised)
    x = result.train.inputs(np.arange(result.train.size)).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(2).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(2).double(), rtol=1e-5, atol=0)
    assert torch.equal(result.validation.statistics()["mean"], result.test.statistics()["mean"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_no_part_is_empty(share: float) -> None:
    with refuses(DataError, "data.validation-empty"):
        hold_out(splits(), share, 0, DEFAULT_TASK)


def test_a_third_file_is_the_validation_split(tmp_path: Path) -> None:
    for name, size in (("a", 20), ("b", 9), ("c", 7)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"] = np.arange(2.0 * size).reshape(size, 2)
            file["y"] = np.arange(size) % 3
    files = {"train": "a.h5", "test": "b.h5"}
    result = load_data("hdf5", files, tmp_path, normalise=False, validation="c.h5")
    assert {name: split.size for name, split in result.by_name().items()} == {
        **{"train": 20, "test": 9},
        "validation": 7,
    }
    with refuses(ConfigError, "data.validation-path"):
        load_data("digits", {}, tmp_path, validation="c.h5")
    with refuses(DataError, "data.file-missing"):
        load_data("hdf5", files, tmp_path, validation="d.h5")
