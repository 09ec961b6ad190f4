"""Weights of training samples: where they come from, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.data import load_data
from dtrain.data.dataset import Dataset, DatasetSplits
from dtrain.errors import DataError
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.testing.small_run import train
from tests import tiny
from tests.refusals import refuses

W = np.random.default_rng(0).random(50)
ARRAYS = tiny.samples()


class Own(Dataset):
    """A user's class with weights."""

    shape, classes = (2,), 2

    def __init__(self, size: int, weights: Any = None) -> None:
        self.size, self.sample_weights = size, weights

    def inputs(self, indices: Any) -> Tensor:
        return torch.ones(len(np.asarray(indices)), 2)

    def targets(self, indices: Any) -> Tensor:
        return torch.from_numpy(np.asarray(indices) % 2)


def own(weights: Any = W) -> DatasetSplits:
    return DatasetSplits(Own(50, weights), Own(17))


def weighted_function() -> Any:
    return dtrain.data.WeightedArrays(ARRAYS, W)


def write_hdf5(folder: Path) -> dict[str, object]:
    x, y, x_test, y_test = ARRAYS
    for name, parts in {"train": (x, y), "test": (x_test, y_test)}.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"], file["y"] = parts
            if name == "train":
                file["w"], file["short"] = W, W[1:]
    return {"train": "train.h5", "test": "test.h5"}


@pytest.mark.parametrize("validation", [0.0, 0.2])
@pytest.mark.parametrize(
    "kind", ["hdf5", "parts", "share", "npz", "npy", "arrays", "function", "class"]
)
def test_weights_stay_with_their_samples(kind: str, validation: float, tmp_path: Path) -> None:
    name, fields, target = "x:y", dict[str, object](), None
    x, y, x_test, y_test = ARRAYS
    match kind:
        case "hdf5":
            name, fields = "hdf5", write_hdf5(tmp_path) | {"weights": "w"}
        case "parts" | "share":
            name, fields = "hdf5", write_hdf5(tmp_path) | {"weights": "w"}
            for part, rows in {"a": slice(0, 20), "b": slice(20, 50)}.items():
                with h5py.File(tmp_path / f"part-{part}.h5", "w") as file:
                    file["x"], file["y"], file["w"] = x[rows], y[rows], W[rows]
            fields["train"] = "part-*.h5"
            fields |= {"test": 0.3} if kind == "share" else {}
        case "npz":
            np.savez(tmp_path / "train.npz", x=x, y=y, w=W)
            np.savez(tmp_path / "test.npz", x=x_test, y=y_test)
            name, fields = "npz", {"train": "train.npz", "test": "test.npz", "weights": "w"}
        case "npy":
            for stem, array in {"x": x, "y": y, "w": W, "a": x_test, "b": y_test}.items():
                np.save(tmp_path / f"{stem}.npy", array)
            name, fields = "npz", {"train": "x.npy", "train_y": "y.npy", "weights": "w.npy"}
            fields |= {"test": "a.npy", "test_y": "b.npy"}
        case "arrays":
            target = dtrain.data.arrays(*ARRAYS, weights=torch.from_numpy(W))["name"]
        case "function":
            target = weighted_function
        case "class":
            target = own
    splits = load_data(name, fields, tmp_path, validation=validation, target=target)
    indices = np.arange(splits.train.size)
    weights = splits.train.read_sample_weights(indices[::-1].copy())
    assert weights is not None
    assert weights.tolist() == W[splits.train.source_indices(indices)][::-1].tolist()
    if kind != "share":
        assert splits.test.read_sample_weights([0]) is None


def test_weights_of_a_file_are_checked(tmp_path: Path) -> None:
    fields = write_hdf5(tmp_path)
    assert load_data("hdf5", fields, tmp_path).train.read_sample_weights([0]) is None
    for weights, key in {"short": "data.weights-shape", "x": "data.weights-shape"}.items():
        with refuses(DataError, key):
            load_data("hdf5", fields | {"weights": weights}, tmp_path)
    with refuses(DataError, "data.hdf5-dataset-missing"):
        load_data("hdf5", fields | {"weights": "v"}, tmp_path)


def test_weights_of_a_class_are_checked(tmp_path: Path) -> None:
    for weights, key in ((W[1:], "data.weights-shape"), (-W, "data.weights-invalid")):
        with refuses(DataError, key):
            load_data("x:y", {"weights": weights}, tmp_path, target=own)


def test_the_memory_of_weighted_losses_is_planned() -> None:
    name = dtrain.data.arrays(*ARRAYS, weights=W)["name"]
    run = tiny.run(data__name=name, objective__name="backprop", partition__blocks=2)
    outcome = train(run, 2)
    planned = [memory.peak for memory in MemoryPlan(make_plan(run, 2)).rank_memory()]
    for planned_bytes, counted_bytes in zip(planned, outcome.counted_bytes, strict=True):
        assert abs(planned_bytes / counted_bytes - 1) < 0.1
