"""Cases of users of other tools: each trains to the value that it must have, or is refused.

The cases of attention, of token ids as bytes and of muon are in `test_field_models`, the regression
is in `test_tasks`, data at another path in `test_changed_inputs`, pools in `tests/system`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dtrain.checkpoint.export import load_state_dict
from dtrain.comm.backends.threads import run_ranks
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError, DataError
from dtrain.prediction import predict_run
from tests import field_cases
from tests.field_cases import MODELS, run
from tests.harness import assert_same_model, train_in_threads
from tests.outcome import model
from tests.refusals import refuses
from tests.single import no_report_delay, one_thread  # noqa: F401

TWO = {"stages": 2}
FAST = {"name": "adam", "lr": 1e-2}
DIGITS = {"name": "mlp", "widths": [8, 8]}


def started(out: Path) -> dict[str, Any]:
    """Return the record of the start of a run."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return next(record for record in lines if record["kind"] == "run")


# Models


@pytest.mark.parametrize("case", MODELS)
def test_a_model_trains_the_same_bits_on_any_number_of_stages(case: str, tmp_path: Path) -> None:
    net = case.split()[0]
    stages = (1, 2, 3) if case in ("layer_drop", "nested deeper", "named_containers") else (1, 2)
    for number in stages:
        summary = train_in_threads(run(net, **MODELS[case]), tmp_path / str(number), stages=number)
        assert summary["status"] == "finished"
        assert_same_model(tmp_path / "1", tmp_path / str(number))


@pytest.mark.parametrize("net", ["shared_inside", "tied_inside", "nested", "lazy", "recurrent"])
def test_a_model_trains_what_a_plain_loop_trains(net: str, tmp_path: Path) -> None:
    changes = MODELS[net] | {"dtype": "float64", "epochs": 1}
    config = run(net, **changes)
    train_in_threads(config, tmp_path, stages=2)
    train_in_threads(run(net, **changes, optimizer={"name": "sgd", "lr": 0.0}), tmp_path / "start")
    samples = load_data(config.dataset.name, {}, config.folder).train
    module: nn.Module = getattr(field_cases, net)(samples.shape, 4).double()
    module(samples.inputs([0, 1]).double())  # lazy layers find their widths
    module.load_state_dict(load_state_dict(tmp_path / "start"))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    order = epoch_order(samples.size, seed=1, epoch=0)
    for indices in np.split(order, np.arange(32, samples.size, 32)):
        optimizer.zero_grad()
        cross_entropy(module(samples.inputs(indices).double()), samples.targets(indices)).backward()
        optimizer.step()
    trained = load_state_dict(tmp_path)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", ["complex_filter", "complex_linear"])
def test_complex_numbers_stay_complex_in_checkpoint_export_and_means(
    net: str, tmp_path: Path
) -> None:
    for sync in ("every-step", "local-sgd"):
        out = tmp_path / sync
        train_in_threads(run(net, sync={"name": sync}, mesh=TWO), out, stages=2, replicas=2)
        weights = [model(out)["0.weight"], load_state_dict(out)["0.weight"]]
        assert all(weight.is_complex() for weight in weights)
        assert torch.equal(*weights)
        assert weights[0].imag.abs().min() > 0


def test_replicas_start_equal_from_unseeded_weights(tmp_path: Path) -> None:
    """The debug mode compares them after every update."""
    train_in_threads(run("numpy_initialised", debug=True, mesh=TWO), tmp_path, stages=2, replicas=2)
    assert started(tmp_path)["copied_blocks"] == [0, 1]


# Token ids


def test_ids_of_every_width_in_a_file_are_the_same_ids(tmp_path: Path) -> None:
    digests = set()
    for width in ("uint8", "int32", "uint16", ">i4", "int64"):
        x, y, x_test, y_test = field_cases.tokens()
        (tmp_path / width).mkdir()
        data = field_cases.write(
            tmp_path / width, (x.astype(width), y, x_test.astype(width), y_test)
        )
        digests.add(train_in_threads(run("embedding", data), tmp_path / f"{width}-out")["digest"])
    assert len(digests) == 1


# Tasks


@pytest.mark.parametrize(
    ("dtype", "loss"), [("float64", "mse"), ("float32", "huber"), (">f4", "l1")]
)
def test_numbers_of_other_forms_are_learnt(dtype: str, loss: str, tmp_path: Path) -> None:
    x, y, x_test, y_test = field_cases.numbers()
    data = field_cases.write(tmp_path, (x, y.astype(dtype), x_test, y_test.astype(dtype)))
    config = run("mlp", data, task={"loss": loss}, epochs=20, optimizer=FAST)
    assert train_in_threads(config, tmp_path / "out")["metrics"]["r2"] >= 0.5


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_probabilities_are_learnt_and_the_largest_counts(dtype: str, tmp_path: Path) -> None:
    data = {"name": "tests.field_cases:soft", "dtype": dtype}
    summary = train_in_threads(run("mlp", data, epochs=8, optimizer=FAST), tmp_path, stages=2)
    assert summary["test_accuracy"] >= 0.7


@pytest.mark.parametrize("last", [False, True])
def test_probabilities_per_step_are_learnt(last: bool, tmp_path: Path) -> None:
    data = {"name": "tests.field_cases:soft_steps", "last": last}
    net, task = ("per_step", {"classes-last": True}) if last else ("per_step_first", {})
    config = run(net, data, task=task, epochs=4, optimizer=FAST)
    assert train_in_threads(config, tmp_path, stages=2)["test_accuracy"] >= 0.6
    if last:
        with refuses(DataError, "data.probabilities") as caught:
            train_in_threads(run(net, data), tmp_path / "wrong")
        assert "classes-last" in caught.value.message


def test_probabilities_that_cannot_be_are_refused(tmp_path: Path) -> None:
    x, y, x_test, y_test = field_cases.soft()
    data = field_cases.write(tmp_path, (x, 2 * y, x_test, 2 * y_test))
    with refuses(DataError, "data.probabilities"):
        train_in_threads(run("mlp", data), tmp_path / "out", stages=2)
    with refuses(ConfigError, "task.ignore-index-probabilities"):
        train_in_threads(run("mlp", "soft", task={"ignore-index": 3}), tmp_path / "out")


# Samples


@pytest.mark.parametrize(
    "dtype", ["uint16", "int16", "uint32", "int64", ">u2", ">i8", "float16", "float64"]
)
def test_counts_of_every_dtype_train(dtype: str, tmp_path: Path) -> None:
    """As well as the numbers that they were made from."""
    data = {"name": "tests.field_cases:counts", "dtype": dtype}
    summary = train_in_threads(run("mlp", data, epochs=8, optimizer=FAST), tmp_path, stages=2)
    assert summary["test_accuracy"] >= 0.6


BAD: list[tuple[str, float, str, str]] = [
    ("train", math.nan, "train", "channel 3"),
    ("train", math.inf, "train", "channel 3"),
    ("train", -math.inf, "train", "channel 3"),
    ("test", math.nan, "test", "channel 3"),
    ("validation", math.nan, "validation", "channel 3"),
    ("input", math.nan, "train", "input 1 1"),
    ("input", math.inf, "train", "input 1 1"),
]


@pytest.mark.parametrize(("place", "value", "split", "channel"), BAD)
def test_a_value_that_is_not_finite_is_refused_by_its_place(
    place: str, value: float, split: str, channel: str, tmp_path: Path
) -> None:
    data = {"name": "tests.field_cases:spoiled", "place": place, "value": value}
    with refuses(DataError, "data.not-finite") as caught:
        net = "masked" if place == "input" else "mlp"
        train_in_threads(run(net, data), tmp_path / "out", stages=2)
    message = caught.value.message
    assert all(part in message for part in (f"sample 17 of the {split} split", channel))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("normalise", [True, False])
def test_a_value_of_a_file_that_is_not_finite_is_refused_by_its_place(
    normalise: bool, tmp_path: Path
) -> None:
    data = field_cases.write(tmp_path, field_cases.spoiled()) | {"normalise": normalise}
    with refuses(DataError, "data.not-finite") as caught:
        train_in_threads(run("mlp", data, mesh=TWO), tmp_path / "out", stages=2, replicas=2)
    assert "sample 17 of the train split" in caught.value.message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_target_that_is_not_finite_is_refused_by_its_sample(value: float, tmp_path: Path) -> None:
    data = field_cases.write(tmp_path, field_cases.spoiled("target", value))
    for each in (data, {"name": "tests.field_cases:spoiled", "place": "target", "value": value}):
        with refuses(DataError, "data.targets-not-finite") as caught:
            train_in_threads(run("mlp", each, task={"loss": "mse"}), tmp_path / "out", stages=2)
        assert "sample 17" in caught.value.message


# Labels


COMPACT = {"from one": [1, 2, 3, 4], "gaps": [3, 13, 23, 33], "negative": [-2, -1, 0, 1]} | {
    kind: ["ant", "bee", "cat", "dog"] for kind in ("texts", "bytes")
}


@pytest.mark.parametrize("kind", COMPACT)
def test_compact_labels_train_the_bits_of_labels_from_zero(kind: str, tmp_path: Path) -> None:
    """The summary lists the stored labels, and predictions have them; also on a resumed run."""
    data = {"name": "tests.field_cases:stored_labels", "kind": kind, "labels": "compact"}
    data["validation"] = 0.1
    plain = data | {"kind": "plain", "labels": "as-stored"}
    whole = train_in_threads(run("mlp", plain), tmp_path / "plain")
    assert "class_labels" not in whole
    train_in_threads(run("mlp", data, epochs=1), tmp_path / "out", stages=2)
    summary = train_in_threads(run("mlp", data), tmp_path / "out", stages=2)
    assert (summary["digest"], summary["class_labels"]) == (whole["digest"], COMPACT[kind])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["class_labels"]
    target, samples = tmp_path / "out.h5", field_cases.stored_labels(kind)
    run_ranks(2, lambda comm: predict_run(tmp_path / "out", comm, samples[2], target))
    with h5py.File(target) as file:
        labels = file["label"].asstr()[:] if kind in ("texts", "bytes") else file["label"][:]
        assert labels.tolist() == [COMPACT[kind][number] for number in file["prediction"][:]]
        stored = [v.decode() if isinstance(v, bytes) else v for v in samples[3].tolist()]
        assert (labels == np.array(stored)).mean() == summary["test_accuracy"]


def test_labels_of_own_data_sets_are_in_range_or_refused_at_the_start(tmp_path: Path) -> None:
    for classes in (4, 3):
        config = run("mlp", {"name": "tests.field_cases:own_splits", "classes": classes}, mesh=TWO)
        if classes == 4:
            train_in_threads(config, tmp_path / "4", stages=2, replicas=2)
            continue
        with refuses(DataError, "data.labels-out-of-range"):
            train_in_threads(config, tmp_path / "3", stages=2, replicas=2)
        assert not (tmp_path / "3").exists()


def test_labels_of_a_resumed_run_are_numbered_as_before(tmp_path: Path) -> None:
    data = {"name": "tests.field_cases:stored_labels", "kind": "from one"}
    train_in_threads(run("mlp", data | {"labels": "compact"}, epochs=1), tmp_path)
    with refuses(ConfigError, "resume.settings-changed"):
        train_in_threads(run("mlp", data), tmp_path)


def test_labels_from_one_are_a_note_and_predictions_have_no_other_labels(tmp_path: Path) -> None:
    """The note is on all of the run's records; the digits have none."""
    data = {"name": "tests.field_cases:stored_labels", "kind": "from one"}
    train_in_threads(run("mlp", data, epochs=1, mesh=TWO), tmp_path, stages=2, replicas=2)
    [note] = started(tmp_path)["notes"]
    assert 'labels = "compact"' in note
    out = tmp_path / "out.h5"
    run_ranks(1, lambda comm: predict_run(tmp_path, comm, field_cases.blobs()[2], out))
    with h5py.File(out) as file:
        assert set(file) == {"output", "prediction"}
    digits = run("mlp", {"name": "digits"}, updates=1, epochs=None, model=DIGITS)
    train_in_threads(digits, tmp_path / "digits")
    assert started(tmp_path / "digits")["notes"] == []
