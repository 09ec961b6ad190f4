"""Evaluating a finished run: the numbers of its summary, bit for bit, on any number of ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from dtrain.checkpoint import ownership
from dtrain.checkpoint.manifest import Manifest, latest_checkpoint
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.data.sampler import BatchSplitter
from dtrain.errors import CheckpointError, ConfigError, DtrainError
from dtrain.evaluation import evaluate_run, evaluation_batches
from dtrain.monitoring.summary import evaluation_text
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.mono_forward import MonoForward
from tests import tiny
from tests.harness import train_in_threads
from tests.manifests import edit_manifest, renumber
from tests.outcome import summary
from tests.refusals import refuses

PICTURES = {
    "data": {"name": "tests.ranks.test_evaluate:pictures"},
    "model": {"name": "cnn", "widths": [[4, 4], [6]]},
    "dtype": "float32",
}
RUNS: dict[str, dict[str, Any]] = {
    "mono-forward": {},
    "backprop": {"objective__name": "backprop"},
    "cnn": PICTURES,
    "float32": {"dtype": "float32"},
}
KEYS = {
    "test_loss": "loss",
    "test_accuracy": "accuracy",
    "test_accuracy_vote": "accuracy_vote",
    "accuracy_per_block": "accuracy_per_block",
}


def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 50 training and 37 test images of 6 x 6 pixels."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(87, 2, 6, 6)), random.integers(0, 4, 87)
    return x[:50], y[:50], x[50:], y[50:]


def other_samples() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the tiny run's training samples with other test samples."""
    x, y, *_ = tiny.samples()
    return x, y, x[:9] + 1, y[:9]


def evaluated(out: Path, ranks: int = 1, *arguments: Any) -> dict[str, Any]:
    """Evaluate the run in `out` on threads and return the result, the same on all ranks."""

    def work(comm: Comm) -> dict[str, Any]:
        return evaluate_run(out, comm, *arguments)

    results = run_ranks(ranks, work)
    assert all(result == results[0] for result in results)
    return results[0]


def assert_metrics_of(result: dict[str, Any], training: dict[str, Any]) -> None:
    """Assert that an evaluation has the metrics of the summary of the run."""
    assert {key: result[name] for key, name in KEYS.items()} == {key: training[key] for key in KEYS}


def content(out: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_of_the_summary_on_any_number_of_ranks(
    name: str, replicas: int, tmp_path: Path
) -> None:
    """More ranks than blocks too; the last micro-batches of both replicas are short."""
    training = train_in_threads(tiny.run(**RUNS[name], mesh__stages=2), tmp_path, 2, replicas)
    files = content(tmp_path)
    for ranks in (1, 2, 3, 4, 5):
        result = evaluated(tmp_path, ranks)
        assert_metrics_of(result, training)
        assert (result["ranks"], result["stages"]) == (ranks, {4: 2, 5: 1}.get(ranks, ranks))
    assert content(tmp_path) == files
    assert (result["updates"], result["epochs"]) == (8, 2)
    assert result["samples"] == (37 if "cnn" in name else 17)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_predicts_as_in_its_run(objective: str, tmp_path: Path) -> None:
    """By the last block, by votes, by passes of its own; two replicas, short micro-batches."""
    run = tiny.run(objective__name=objective, mesh__stages=1, epochs=1, micro_batches=1)
    training = train_in_threads(run, tmp_path, 1, 2)
    for ranks in (1, 3):
        assert_metrics_of(evaluated(tmp_path, ranks), training)


@pytest.mark.parametrize("sync", ["never", "local-sgd"])
def test_the_mean_of_diverged_replicas_is_evaluated(sync: str, tmp_path: Path) -> None:
    training = train_in_threads(tiny.run(sync__name=sync, mesh__stages=1), tmp_path, 1, 3)
    for ranks in (1, 3):
        assert_metrics_of(evaluated(tmp_path, ranks), training)


def test_the_prediction_is_the_objectives_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MonoForward, "predicts_by_vote", True)
    training = train_in_threads(tiny.run(), tmp_path, 1)
    result = evaluated(tmp_path, 2)
    assert result["accuracy"] == training["test_accuracy"] == result["accuracy_vote"]
    assert result["prediction"] == "vote"
    assert "vote" in evaluation_text(result)


def test_the_training_split_and_other_data(tmp_path: Path) -> None:
    """In order, without augmentation; `--set` takes data, but no key of training."""
    train_in_threads(tiny.run(), tmp_path, 1)
    result = evaluated(tmp_path, 2, "train")
    assert (result["split"], result["samples"]) == ("train", 50)
    assert result["accuracy"] * 50 == pytest.approx(round(result["accuracy"] * 50))
    other = evaluated(tmp_path, 1, "test", ["data.name=tests.ranks.test_evaluate:other_samples"])
    assert other["samples"] == 9
    assert other["loss"] != evaluated(tmp_path)["loss"]
    with refuses(ConfigError, "evaluate.override"):
        evaluated(tmp_path, 1, "test", ["optimizer.lr=1"])


def test_fields_of_predictions_are_set_after_training(tmp_path: Path) -> None:
    """Several chains of NoProp predict as a run that had them, on any number of ranks."""
    changes: dict[str, Any] = {"partition": {"cuts": [1, 2]}}
    for folder, chains in (("one", 1), ("three", 3)):
        objective = {"name": "noprop", "chains": chains}
        train_in_threads(tiny.run(objective=objective, **changes), tmp_path / folder, 1)
    one, three = evaluated(tmp_path / "one"), evaluated(tmp_path / "three")
    assert one["loss"] != three["loss"]
    for ranks in (1, 3):
        again = evaluated(tmp_path / "one", ranks, "test", ["objective.chains=3"])
        assert again["loss"] == three["loss"]
        assert again["accuracy_per_block"] == three["accuracy_per_block"]
    with refuses(ConfigError, "evaluate.override"):
        evaluated(tmp_path / "one", 1, "test", ["objective.width=4"])


def test_a_training_run_is_evaluated_at_its_newest_checkpoint(tmp_path: Path) -> None:
    train_in_threads(tiny.run(), tmp_path, 1)
    owner = ownership.acquire(tmp_path)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    shutil.copytree(newest.folder, newest.folder.with_name("update-00000012.part"))
    assert evaluated(tmp_path)["updates"] == 8
    assert json.loads((tmp_path / "owner.json").read_text()) == owner
    shutil.rmtree(newest.folder)
    result = evaluated(tmp_path)
    assert (result["updates"], result["checkpoint"]) == (4, "update-00000004")


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_left_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all ranks, also by those that could still read it."""
    train_in_threads(tiny.run(), tmp_path, 1)
    newest, load = tmp_path / "checkpoints" / "update-00000008", Manifest.load

    def load_late(self: Manifest, keys: Iterable[str]) -> dict[str, Tensor]:
        if self.folder == newest and newest.exists():
            renumber(newest, 9)
        return load(self, keys)

    monkeypatch.setattr(Manifest, "load", load_late)
    assert evaluated(tmp_path, 2)["checkpoint"] == "update-00000009"


@pytest.mark.parametrize(
    "fault", ["shard", "manifest", "content", "none", "no run", "nothing", "first line"]
)
def test_a_run_that_cannot_be_evaluated_is_refused_by_all_ranks(fault: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_in_threads(tiny.run(epochs=1), out, 1)
    (newest,) = (out / "checkpoints").iterdir()
    kind: type[DtrainError] = ConfigError
    match fault:
        case "shard":
            with (newest / "replica-0-stage-0.h5").open("r+b") as file:
                file.seek(3000)
                file.write(b"!!!!")
            kind, key = CheckpointError, "checkpoint.shard-damaged"
        case "manifest":
            (newest / "manifest.json").write_text("{")
            kind, key = CheckpointError, "checkpoint.manifest-damaged"
        case "content":
            (newest / "manifest.json").write_text('{"shards": []}')
            kind, key = CheckpointError, "checkpoint.manifest-damaged"
        case "none":
            shutil.rmtree(newest)
            key = "run-folder.no-checkpoint"
        case "no run":
            (out / "run.toml").unlink()
            key = "run-folder.no-run-file"
        case "nothing":
            shutil.rmtree(out)
            key = "run-folder.missing"
        case _:
            text = (out / "run.toml").read_text().partition("\n")[2]
            (out / "run.toml").write_text(text)
            key = "run-folder.no-source-path"
    with refuses(kind, key) as caught:
        evaluated(out, 2)
    assert (caught.value.code, caught.value.on_all_ranks) == (
        5 if kind is CheckpointError else 2,
        True,
    )


@pytest.mark.parametrize(("size", "replicas", "batch", "micros"), [(17, 2, 16, 3), (5, 3, 4, 1)])
def test_micro_batches_of_an_evaluation_are_those_of_the_run(
    size: int, replicas: int, batch: int, micros: int
) -> None:
    splitter = BatchSplitter(batch, replicas, micros)
    batches = evaluation_batches(size, splitter)
    assert [index for batch in batches for index in batch] == list(range(size))
    assert all(0 < len(batch) <= splitter.largest_micro_batch for batch in batches)


def test_the_printed_evaluation_has_the_numbers(tmp_path: Path) -> None:
    training = train_in_threads(tiny.run(mesh__stages=1), tmp_path, 1)
    text = evaluation_text(evaluated(tmp_path))
    correct = round(training["test_accuracy"] * 17)
    for number in (
        str(tmp_path),
        "8 updates (2 epochs)",
        "17 samples",
        f"{training['test_loss']:.4f}",
        f"({correct} of 17)",
    ):
        assert number in text, text
    assert summary(tmp_path) == training


def test_a_run_folder_of_an_earlier_version_is_evaluated_and_resumed(tmp_path: Path) -> None:
    """Its run table and `run.toml` have keys that were renamed since."""
    run = tiny.run(epochs=1, mesh__stages=1, sync={"name": "powersgd"})
    train_in_threads(run, tmp_path, 1)
    (newest,) = (tmp_path / "checkpoints").iterdir()

    def old_names(text: str) -> str:
        assert "activation-compression" in text
        text = text.replace("activation-compression", "wire")
        return text.replace("min-compression-rate", "worth")

    path = tmp_path / "run.toml"
    path.write_text(old_names(path.read_text()))
    edit_manifest(
        newest, lambda content: content.update(json.loads(old_names(json.dumps(content))))
    )
    evaluated(tmp_path)
    longer = tiny.run(mesh__stages=1, sync={"name": "powersgd"})
    assert train_in_threads(longer, tmp_path, 1)["updates"] == 8
