"""Evaluating a finished run: the numbers of its summary, bit for bit, on any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.checkpoint import run_folder as folder
from dtrain.checkpoint import store as checkpoint
from dtrain.checkpoint.manifest import latest_checkpoint, read_manifest
from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data.sampler import BatchSplitter
from dtrain.errors import DtrainError
from dtrain.evaluate import evaluate_run, evaluation_batches
from dtrain.monitoring.summary import evaluation_text
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.mono_forward import MonoForward
from dtrain.train import train
from tests import tiny
from tests.outcome import summary

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


def more() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the tiny run's samples with others to test."""
    x, y, *_ = tiny.samples()
    return x, y, x[:9] + 1, y[:9]


def trained(run: RunConfig, out: Path, stages: int, replicas: int = 1) -> dict[str, Any]:
    """Train on threads and return the summary."""

    def work(comm: Comm) -> dict[str, Any]:
        return train(run, comm, out)

    return ranks(stages * replicas, work)[0]


def examined(out: Path, count: int = 1, *told: Any) -> dict[str, Any]:
    """Examine the run in `out` on threads; all ranks find the same."""

    def work(comm: Comm) -> dict[str, Any]:
        return evaluate_run(out, comm, *told)

    found = ranks(count, work)
    assert all(each == found[0] for each in found)
    return found[0]


def content(out: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_of_the_summary_on_any_number_of_ranks(
    name: str, replicas: int, tmp_path: Path
) -> None:
    """More ranks than blocks too; the last micro-batches of both replicas are short."""
    told = trained(tiny.run(**RUNS[name], mesh__stages=2), tmp_path, 2, replicas)
    before = content(tmp_path)
    for count in (1, 2, 3, 4, 5):
        found = examined(tmp_path, count)
        assert {key: found[own] for key, own in KEYS.items()} == {key: told[key] for key in KEYS}
        assert (found["ranks"], found["stages"]) == (count, {4: 2, 5: 1}.get(count, count))
    assert content(tmp_path) == before
    assert (found["updates"], found["epochs"], found["samples"]) == (
        8,
        2,
        37 if "cnn" in name else 17,
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_predicts_as_in_its_run(objective: str, tmp_path: Path) -> None:
    """By the last block, by votes, by passes of its own; two replicas, short micro-batches."""
    run = tiny.run(objective__name=objective, mesh__stages=1, epochs=1, micro_batches=1)
    told = trained(run, tmp_path, 1, 2)
    for count in (1, 3):
        found = examined(tmp_path, count)
        assert {key: found[own] for key, own in KEYS.items()} == {key: told[key] for key in KEYS}


@pytest.mark.parametrize("sync", ["never", "local-sgd"])
def test_what_is_examined_is_the_mean_of_replicas_apart(sync: str, tmp_path: Path) -> None:
    told = trained(tiny.run(sync__name=sync, mesh__stages=1), tmp_path, 1, 3)
    for count in (1, 3):
        found = examined(tmp_path, count)
        assert {key: found[own] for key, own in KEYS.items()} == {key: told[key] for key in KEYS}


def test_the_prediction_is_the_objectives_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MonoForward, "predicts_by_vote", True)
    told = trained(tiny.run(), tmp_path, 1)
    found = examined(tmp_path, 2)
    assert found["accuracy"] == told["test_accuracy"] == found["accuracy_vote"]
    assert found["prediction"] == "vote"
    assert "the vote's" in evaluation_text(found)


def test_the_training_split_and_other_data(tmp_path: Path) -> None:
    """Not augmented and in order; `--set` may name other data, and nothing that was trained."""
    trained(tiny.run(), tmp_path, 1)
    learnt = examined(tmp_path, 2, "train")
    assert (learnt["split"], learnt["samples"]) == ("train", 50)
    assert learnt["accuracy"] * 50 == pytest.approx(round(learnt["accuracy"] * 50))
    other = examined(tmp_path, 1, "test", ["data.name=tests.ranks.test_evaluate:more"])
    assert other["samples"] == 9
    assert other["loss"] != examined(tmp_path)["loss"]
    with pytest.raises(
        DtrainError, match=r"--set optimizer\.lr=1: .*takes data\.\*, device and threads"
    ):
        examined(tmp_path, 1, "test", ["optimizer.lr=1"])


def test_a_run_that_is_going_on_is_examined_at_its_newest_checkpoint(tmp_path: Path) -> None:
    trained(tiny.run(), tmp_path, 1)
    token = folder.acquire(tmp_path)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    shutil.copytree(newest.folder, newest.folder.with_name("update-00000012.part"))
    assert examined(tmp_path)["updates"] == 8
    assert json.loads((tmp_path / "owner.json").read_text()) == token
    shutil.rmtree(newest.folder)
    found = examined(tmp_path)
    assert (found["updates"], found["checkpoint"]) == (4, "update-00000004")


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_left_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tiny.run(), tmp_path, 1)
    newest, read = tmp_path / "checkpoints" / "update-00000008", read_manifest

    def late(path: Path) -> checkpoint.Manifest:
        manifest = read(path)
        if path == newest and newest.exists():
            newest.rename(newest.with_name("update-00000009"))
        return manifest

    monkeypatch.setattr("dtrain.evaluate.read_manifest", late)
    assert examined(tmp_path, 2)["checkpoint"] == "update-00000009"


@pytest.mark.parametrize("fault", ["shard", "manifest", "none", "no run", "nothing", "first line"])
def test_what_cannot_be_examined_is_refused_by_all_ranks(fault: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained(tiny.run(epochs=1), out, 1)
    (newest,) = (out / "checkpoints").iterdir()
    words, code = "is damaged", 3
    match fault:
        case "shard":
            with (newest / "replica-0-stage-0.h5").open("r+b") as file:
                file.seek(3000)
                file.write(b"!!!!")
        case "manifest":
            (newest / "manifest.json").write_text("{")
        case "none":
            shutil.rmtree(newest)
            words, code = "there is no complete checkpoint in .*: .*end of its first epoch", 2
        case "no run":
            (out / "run.toml").unlink()
            words, code = "holds no run.toml", 2
        case "nothing":
            shutil.rmtree(out)
            words, code = "there is no run folder", 2
        case _:
            text = (out / "run.toml").read_text().partition("\n")[2]
            (out / "run.toml").write_text(text)
            words, code = "first line .* where relative paths and imports start", 2
    with pytest.raises(DtrainError, match=words) as refusal:
        examined(out, 2)
    assert (refusal.value.code, refusal.value.agreed) == (code, True)


@pytest.mark.parametrize(("size", "replicas", "batch", "micros"), [(17, 2, 16, 3), (5, 3, 4, 1)])
def test_micro_batches_of_an_exam_are_those_of_the_run(
    size: int, replicas: int, batch: int, micros: int
) -> None:
    shares = BatchSplitter(batch, replicas, micros)
    found = evaluation_batches(size, shares)
    assert [index for micro in found for index in micro] == list(range(size))
    assert all(0 < len(micro) <= shares.largest_micro_batch for micro in found)


def test_what_a_person_reads(tmp_path: Path) -> None:
    told = trained(tiny.run(mesh__stages=1), tmp_path, 1)
    text = evaluation_text(examined(tmp_path))
    right = round(told["test_accuracy"] * 17)
    for words in (
        f"folder    {tmp_path}",
        "8 updates (2 epochs)",
        "17 samples of the test split",
        f"loss      {told['test_loss']:.4f}",
        f"({right} of 17), the last block's",
        "vote      ",
        "blocks    ",
    ):
        assert words in text, text
    assert summary(tmp_path) == told
