"""Statistics at the start of a run: shared over ranks, kept in the run folder, errors on all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dtrain.checkpoint.export import export
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.data import statistics as module
from dtrain.data.hdf5_source import Hdf5Source
from dtrain.data.kept_statistics import STATISTICS_FILE
from dtrain.data.statistics import StatisticsPass, find_standardised
from dtrain.errors import DataError
from dtrain.evaluation import evaluate_run
from dtrain.planning.plan import make_plan
from dtrain.shared_statistics import share_statistics
from tests import tiny
from tests.harness import assert_same_model, train_in_threads
from tests.refusals import refuses

RNG = np.random.default_rng(1)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces small, so that each rank has some."""
    for name, value in (("SAMPLES_PER_READ", 7), ("EXACT_PIECE_BYTES", 70)):
        monkeypatch.setattr(module, name, value)


def write(folder: Path, dtype: str) -> dict[str, Any]:
    """Write the samples of the tiny run into files, and return the table of them."""
    x, y, xt, yt = tiny.samples()
    for name, inputs, labels in (("train", x, y), ("test", xt, yt)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"], file["y"] = (40 * inputs + 100).clip(0, 255).astype(dtype), labels
    return {"name": "hdf5", "train": str(folder / "train.h5"), "test": str(folder / "test.h5")}


def forbid(*_: object) -> None:
    raise AssertionError("statistics were computed again")


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_any_number_of_ranks_computes_the_same_bits_together(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    read_range = Hdf5Source.read_range

    def count(self: Hdf5Source, start: int, stop: int) -> Any:
        if self.name == "x" and (start, stop) != (0, 1):  # but the first sample
            read.append((start, stop))
        return read_range(self, start, stop)

    monkeypatch.setattr(Hdf5Source, "read_range", count)
    data = write(tmp_path, dtype)
    plan = make_plan(tiny.run(data=data), 1)
    train = find_standardised(plan.data.train)
    assert train is not None
    expected = train.training.moments
    pieces = sorted(read)
    assert len(pieces) == 8
    for ranks in (1, 2, 3, 9):
        read.clear()

        def work(comm: Comm) -> Any:
            own = make_plan(tiny.run(data=data), 1)
            computed = share_statistics(own.data, comm, forbid)
            assert computed
            split = find_standardised(own.data.test)
            assert split is not None
            return split.training.moments

        plans = run_ranks(ranks, work)
        assert all(
            np.array_equal(m, e) for each in plans for m, e in zip(each, expected, strict=True)
        )
        assert sorted(read) == pieces  # each piece once


def test_statistics_are_kept_for_later_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path, "float32")
    for ranks, out in ((1, "one"), (2, "two"), (3, "three")):
        train_in_threads(tiny.run(data=data), tmp_path / out, ranks)
        kept = (tmp_path / out / STATISTICS_FILE).read_bytes()
        assert kept == (tmp_path / "one" / STATISTICS_FILE).read_bytes()
        assert_same_model(tmp_path / out, tmp_path / "one")
    whole = train_in_threads(tiny.run(data=data, epochs=3), tmp_path / "whole")
    monkeypatch.setattr(StatisticsPass, "__init__", forbid)
    resumed = train_in_threads(tiny.run(data=data, epochs=3), tmp_path / "two", 2)
    assert resumed["digest"] == whole["digest"]
    run_ranks(2, lambda comm: evaluate_run(tmp_path / "one", comm))
    monkeypatch.undo()
    with h5py.File(tmp_path / "train.h5", "r+") as file:
        file["x"][49] += 1
    train_in_threads(tiny.run(data=data), tmp_path / "other")
    other = json.loads((tmp_path / "other" / STATISTICS_FILE).read_text())
    assert other["mean"] != json.loads(kept)["mean"]
    assert other["data"] != json.loads(kept)["data"]


def test_kept_statistics_serve_evaluations_of_inputs_as_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their targets are standardised, too, and their checkpoints hold no statistics."""
    run = tiny.run(
        data=write(tmp_path, "float32"),
        task={"loss": "mse", "target": "input", "metrics": ["r2"]},
        model={"name": "tests.task_data:autoencoder"},
        partition={"blocks": 1},
        objective__name="backprop",
    )
    trained = train_in_threads(run, tmp_path / "out")
    monkeypatch.setattr(StatisticsPass, "__init__", forbid)
    [result, _] = run_ranks(2, lambda comm: evaluate_run(tmp_path / "out", comm))
    assert result["loss"] == trained["test_loss"]


def test_statistics_of_a_file_are_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path, "uint8")
    with h5py.File(tmp_path / "train.h5", "r+") as file:
        file.attrs["mean"], file.attrs["std"] = [90.0, 110.0], [30.0, 50.0]
    monkeypatch.setattr(StatisticsPass, "__init__", forbid)
    assert train_in_threads(tiny.run(data=data), tmp_path / "out", 2)["status"] == "finished"
    assert not (tmp_path / "out" / STATISTICS_FILE).exists()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.session.data_notes.CHECK_S", 0.0)
    data = write(tmp_path, "float32")
    with h5py.File(tmp_path / "train.h5", "r+") as file:
        file["x"][44, 1, 2] = math.nan
        file["x"][45, 0, 2] = math.inf
    with refuses(DataError, "data.not-finite") as caught:
        train_in_threads(tiny.run(data=data), tmp_path / "out", ranks)
    text = str(caught.value)
    assert all(word in text for word in ("sample 44", "train split", "channel 1", "of 2 numbers"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_number_of_an_array_that_is_not_finite_is_named(dtype: str, tmp_path: Path) -> None:
    x, y, *_ = tiny.samples()
    x = x.reshape(50, 10).astype(dtype)
    x[17, 3] = math.nan
    run = tiny.run(data={"name": (x, y, x[:9], y[:9])})
    with refuses(DataError, "data.not-finite") as caught:
        train_in_threads(run, tmp_path / "out", 2)
    text = str(caught.value)
    assert all(word in text for word in ("sample 17", "train split", "channel 3"))


def test_a_rank_that_cannot_read_fails_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read_range = write(tmp_path, "float32"), Hdf5Source.read_range

    def fail(self: Hdf5Source, start: int, stop: int) -> Any:
        if self.name == "x" and start >= 42:
            raise DataError("data.file-damaged", "a bad sector")
        return read_range(self, start, stop)

    monkeypatch.setattr(Hdf5Source, "read_range", fail)

    def work(comm: Comm) -> bool:
        own = make_plan(tiny.run(data=data), 1)
        with refuses(DataError, "data.file-damaged"):
            share_statistics(own.data, comm, forbid)
        return True

    assert run_ranks(3, work) == [True] * 3


def series() -> tuple[np.ndarray, ...]:
    """Return samples of 6 steps and 4 features of different scales."""
    y = RNG.integers(0, 2, 60)
    x = (RNG.normal(size=(60, 6, 4)) + y[:, None, None]) * [1, 10, 100, 1000]
    return x[:40], y[:40], x[40:], y[40:]


def test_a_run_with_channels_last(tmp_path: Path) -> None:
    out, x = tmp_path / "out", series()
    run = tiny.run(data={"name": x, "channels": "last"})
    train_in_threads(run, out, 2)
    kept = json.loads((out / STATISTICS_FILE).read_text())
    np.testing.assert_allclose(kept["mean"], x[0].mean((0, 1)))
    state = export(out, tmp_path / "net.pt", with_normalisation=True)
    assert state["normalise.mean"].shape == (1, 4)
    np.testing.assert_allclose(state["normalise.std"], x[0].std((0, 1))[None])


def test_models_that_take_integers_start_without_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = RNG.integers(0, 9, (50, 6)).astype(np.uint8)
    y = (x[:, 0] % 3).astype(np.int64)

    def model(shape: tuple[int, ...], classes: int) -> torch.nn.Module:
        layers = torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(24, classes)
        return torch.nn.Sequential(*layers)

    monkeypatch.setattr(StatisticsPass, "__init__", forbid)
    run = tiny.run(
        data={"name": (x, y, x, y)},
        model={"name": model},
        partition={"blocks": 1},
        objective__name="backprop",
    )
    assert train_in_threads(run, tmp_path / "out")["status"] == "finished"
    assert not (tmp_path / "out" / STATISTICS_FILE).exists()
