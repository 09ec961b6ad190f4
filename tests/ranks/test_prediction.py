"""Predictions: any ranks give the outputs of the exported model, in the order of the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dtrain.checkpoint.export import load_state_dict
from dtrain.comm.backends.threads import run_ranks
from dtrain.config.run import RunConfig
from dtrain.data import load_data
from dtrain.errors import DataError
from dtrain.prediction import predict_run
from dtrain.training import train
from tests import graph_nets, tiny
from tests.refusals import refuses


def predict(folder: Path, data: Any, ranks: int = 1, out: Path | None = None) -> Any:
    """Predict on ranks that are threads; return the result of rank 0."""
    results = run_ranks(ranks, lambda comm: predict_run(folder, comm, data, out))
    assert all(result is None for result in results[1:])
    return results[0]


def trained(folder: Path, **changes: Any) -> RunConfig:
    """Train the tiny run; return it."""
    run = tiny.run(**changes)
    run_ranks(1, lambda comm: train(run, comm, folder))
    return run


CASES: dict[str, dict[str, Any]] = {
    "labels": {"model__name": "tests.tiny:writing", "model__widths": None},
    "values": {
        "data__name": "tests.graph_nets:fields",
        "model__name": "tests.graph_nets:unet",
        "model__widths": None,
        "objective__name": "backprop",
        "task__loss": "mse",
    },
    "tokens": {
        "data__name": "tests.graph_nets:masked_tokens",
        "model__name": "tests.graph_nets:masked_mean",
        "model__widths": None,
        "partition__blocks": 2,
        "objective__name": "backprop",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_any_ranks_give_the_outputs_of_the_exported_model(case: str, tmp_path: Path) -> None:
    run = trained(tmp_path, **CASES[case])
    splits = load_data(run.dataset.name, {}, run.folder, task=run.task)
    function = {"labels": tiny.writing, "values": graph_nets.unet}.get(case)
    module = graph_nets.masked_mean(3) if function is None else function()
    module = module.double()
    module.load_state_dict(load_state_dict(tmp_path))
    module.eval()
    rows = np.arange(splits.test.size)
    others = splits.test.read_other_inputs(rows)
    if case == "tokens":
        inputs = splits.as_integers().test.inputs(rows)
    else:
        inputs = splits.test.inputs(rows).double()
    with torch.no_grad():
        expected = module(inputs, *others).numpy()
    raw = raw_test_inputs(run)
    outputs = predict(tmp_path, raw)
    assert outputs.shape == expected.shape
    assert outputs.dtype == np.float64
    np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-12)
    for ranks in (2, 3, 4):
        assert np.array_equal(predict(tmp_path, raw, ranks), outputs)
    assert np.array_equal(predict(tmp_path, "test"), outputs)
    first = tuple(x[:1] for x in raw) if isinstance(raw, tuple) else raw[:1]
    np.testing.assert_allclose(predict(tmp_path, first, 2), expected[:1], rtol=1e-12, atol=1e-12)


def raw_test_inputs(run: RunConfig) -> Any:
    """Return the test inputs as the user's function gives them."""
    module, function = run.dataset.name.split(":")
    return getattr({"tests.tiny": tiny}.get(module, graph_nets), function)()[2]


@pytest.mark.parametrize("objective", ["mono-forward", "forward-forward"])
def test_the_largest_output_is_the_prediction_that_was_tested(
    objective: str, tmp_path: Path
) -> None:
    """Of the last block, or of the vote."""
    run = trained(tmp_path, objective__name=objective, updates=6, epochs=None)
    labels = tiny.samples()[3]
    out = tmp_path / "outputs.h5"
    assert predict(tmp_path, tiny.samples()[2], 2, out) is None
    with h5py.File(out) as file:
        outputs, prediction = file["output"][:], file["prediction"][:]
        assert file.attrs["checkpoint"].startswith("update-")
    assert np.array_equal(outputs, predict(tmp_path, "test", 3))
    assert np.array_equal(prediction, outputs.argmax(1))
    summary = run_ranks(1, lambda comm: train(run, comm, tmp_path))[0]
    assert (prediction == labels).mean() == summary["test_accuracy"]


def tables(x: NDArray[Any], y: NDArray[Any], folder: Path, name: str) -> None:
    """Write samples as a table, without and with the target, and in the other formats."""
    rows = x.reshape(len(x), -1)
    header = ",".join(f"f{i}" for i in range(rows.shape[1]))
    np.savetxt(folder / f"{name}-x.csv", rows, "%.17g", ",")
    table = np.column_stack([rows, y])
    np.savetxt(folder / f"{name}.csv", table, "%.17g", ",", header=f"{header},class", comments="")
    np.savez(folder / f"{name}.npz", x=rows, y=y)
    np.save(folder / f"{name}.npy", rows)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["samples"], file["x"], file["y"] = rows, rows, y


@pytest.mark.parametrize("trained_on", ["csv", "hdf5"])
def test_files_of_every_format_give_the_outputs_of_their_samples(
    trained_on: str, tmp_path: Path
) -> None:
    x, y, x_test, y_test = tiny.samples()
    tables(x, y, tmp_path, "train")
    tables(x_test, y_test, tmp_path, "test")
    keys = {"csv": {}, "hdf5": {"data__x": "samples"}}[trained_on]
    suffix = {"csv": "csv", "hdf5": "h5"}[trained_on]
    for split in ("train", "test"):
        keys[f"data__{split}"] = str(tmp_path / f"{split}.{suffix}")
    folder = tmp_path / "run"
    trained(folder, data__name=trained_on, updates=2, epochs=None, **keys)
    expected = predict(folder, "test")
    names = {"csv": ("test.csv", "test-x.csv"), "hdf5": ("test-x.csv",)}[trained_on]
    for name in (*names, "test.npz", "test.npy", "test.h5"):
        assert np.array_equal(predict(folder, str(tmp_path / name)), expected), name


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, updates=1, epochs=None)
    x: NDArray[Any] = tiny.samples()[2]
    np.save(tmp_path / "x.npy", x)
    assert np.array_equal(predict(tmp_path, str(tmp_path / "x.npy")), predict(tmp_path, x))
    for data, key in (
        (x[:, 0], "predict.shape"),
        (x[:0], "predict.shape"),
        ((x, x), "predict.inputs"),
        (str(tmp_path / "none.h5"), "predict.unreadable"),
    ):
        with refuses(DataError, key):
            predict(tmp_path, data, 2)
