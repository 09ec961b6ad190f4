"""Awkward models, data and restarts: which are refused, and that the laws hold for the others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.errors import CheckpointError, ConfigError, DataError, NumericalError
from dtrain.training import train
from tests import tiny
from tests.harness import FULL, train_in_threads
from tests.manifests import edit_manifest
from tests.outcome import break_off, model, summary
from tests.refusals import refuses

MODELS = ["rebinding", "noisy", "writing", "normalised", "converting"]
BROKEN: dict[str, Any] = {
    "dtype": "float32",
    "optimizer": {"name": "sgd", "lr": 3e38, "weight-decay": 100.0},
}


def clipped() -> nn.Sequential:
    """Return a net whose first layer writes to its input."""
    hidden = [nn.Linear(10, 12), nn.ReLU(inplace=True), nn.Linear(12, 8)]
    return nn.Sequential(
        nn.Flatten(), nn.Hardtanh(-0.5, 0.5, inplace=True), *hidden, nn.Linear(8, 3)
    )


@pytest.mark.parametrize("objective", tiny.NEIGHBOURS)
@pytest.mark.parametrize("name", MODELS)
def test_awkward_models_keep_laws_1_and_5(name: str, objective: str, tmp_path: Path) -> None:
    changes = {"model": {"name": f"tests.tiny:{name}"}, "objective__name": objective}
    changes |= {"partition__blocks": None, "partition__cuts": [2, 4]}
    one_rank = train_in_threads(tiny.run(**changes), tmp_path / "1")
    for stages in (2, 3) if FULL else (2,) if objective == "backprop" else (3,):
        out = tmp_path / f"{stages}"
        train_in_threads(tiny.run(**changes, mesh__stages=stages, epochs=1), out, stages)
        resumed = train_in_threads(tiny.run(**changes, mesh__stages=stages), out, stages)
        for key in ("digest", "test_loss", "test_accuracy_vote", "train_loss"):
            assert resumed[key] == one_rank[key], key


@pytest.mark.parametrize("recompute", [False, True])
def test_nobody_writes_to_samples_that_several_blocks_read(recompute: bool, tmp_path: Path) -> None:
    """Three blocks on one rank share the samples, on three ranks each has its own: equal bits."""
    partition = {"cuts": [2, 4], "recompute": recompute}
    fields = {"objective__name": "infopro", "model": {"name": "tests.ranks.test_awkward:clipped"}}

    def digest(stages: int) -> Any:
        run = tiny.run(**fields, partition=partition, mesh__stages=stages)
        return train_in_threads(run, tmp_path / str(stages), stages)["digest"]

    assert digest(1) == digest(3)


def test_a_lone_sample_joins_its_neighbour_where_it_must(tmp_path: Path) -> None:
    """The last update has 2 samples for 3 replicas of 3 micro-batches."""
    run = tiny.run(model={"name": "tests.tiny:normalised"}, mesh__stages=1, partition__blocks=2)
    assert train_in_threads(run, tmp_path, 1, 3)["samples"] == 100
    with refuses(ConfigError, "data.last-batch-too-small"):
        train_in_threads(
            replace(run, settings=replace(run.settings, batch_size=7)), tmp_path / "new"
        )


def test_buffers_that_are_rebound_are_saved(tmp_path: Path) -> None:
    train_in_threads(tiny.run(model={"name": "tests.tiny:rebinding"}), tmp_path)
    assert model(tmp_path)["1.seen"].abs().sum() > 0


def test_data_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    run = tiny.run(data={"name": "tests.tiny:unseeded"}, mesh__stages=2)
    with refuses(DataError, "data.ranks-differ"):
        train_in_threads(run, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_weights_that_the_last_update_broke_end_the_run(tmp_path: Path) -> None:
    run = tiny.run(**BROKEN, epochs=None, updates=1)
    with refuses(NumericalError, "training.weight-not-finite"):
        train_in_threads(run, tmp_path)
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    assert summary(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("updates", [3, 7])
def test_a_run_that_is_found_finished_is_tested_where_it_ended(
    updates: int, tmp_path: Path
) -> None:
    """It was stopped after a checkpoint inside an epoch, and resumed with just that length."""
    changes = {"checkpoint__every": 3, "epochs": None}
    straight = train_in_threads(tiny.run(**changes, updates=updates), tmp_path / "straight")
    stopped = tmp_path / "stopped"
    train_in_threads(tiny.run(**changes, updates=updates + 4), stopped)
    break_off(stopped, updates)
    resumed = train_in_threads(tiny.run(**changes, updates=updates), stopped)
    if resumed["updates"] == straight["updates"]:
        for key in ("digest", "test_loss", "test_accuracy"):
            assert resumed[key] == straight[key], key
    assert resumed["test_loss"] is not None


@pytest.mark.parametrize("replicas", [1, 3])
def test_other_numbers_of_replicas_start_from_the_evaluated_weights(
    replicas: int, tmp_path: Path
) -> None:
    """Law 5, second half, where replicas diverge: training resumes from the evaluated weights."""
    run = tiny.run(sync__name="never", mesh__stages=1)
    first = train_in_threads(run, tmp_path, 1, 2)
    resumed = train_in_threads(run, tmp_path, 1, replicas)
    assert resumed["test_loss"] == first["test_loss"]
    if replicas == 1:
        assert resumed["digest"] == first["digest"]
    longer = tiny.run(sync__name="never", mesh__stages=1, epochs=3)
    assert train_in_threads(longer, tmp_path, 1, replicas)["updates"] == 12


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    train_in_threads(tiny.run(), tmp_path)
    manifest = latest_checkpoint(tmp_path / "checkpoints")
    assert manifest is not None
    before = summary(tmp_path)
    shard = manifest.folder / "replica-0-stage-0.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    shutil.rmtree(tmp_path / "checkpoints" / "update-00000004")
    with refuses(CheckpointError, "checkpoint.none-whole"):
        train_in_threads(tiny.run(epochs=3), tmp_path)
    after = {key: value for key, value in summary(tmp_path).items() if key in before}
    assert after | {"status": "finished"} == before
    (manifest.folder / "manifest.json").write_text("{")
    with refuses(CheckpointError, "checkpoint.none-whole"):
        train_in_threads(tiny.run(epochs=3), tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train_in_threads(tiny.run(), tmp_path)
    manifest = latest_checkpoint(tmp_path / "checkpoints")
    assert manifest is not None

    def change(content: dict[str, Any]) -> None:
        content["run"]["model"]["widths"] = [12, 11, 7, 6]
        del content["fingerprint"]  # which an earlier version did not write

    edit_manifest(manifest.folder, change)
    with refuses(CheckpointError, "checkpoint.wrong-shape"):
        train_in_threads(tiny.run(model__widths=[12, 11, 7, 6]), tmp_path)


def test_attempts_that_died_early_are_counted(tmp_path: Path) -> None:
    for _ in range(2):
        with refuses(NumericalError, "training.loss-not-finite"):
            train_in_threads(tiny.run(**BROKEN), tmp_path)
    assert train_in_threads(tiny.run(), tmp_path)["attempts"] == 3


def test_stages_that_differ_keep_the_blocks_of_the_checkpoint(tmp_path: Path) -> None:
    run = tiny.run(partition__blocks=None, epochs=1)
    train_in_threads(tiny.run(partition__blocks=None, epochs=1, mesh__stages=3), tmp_path, 3)
    assert train_in_threads(run, tmp_path)["blocks"] == 3


def test_going_on_from_another_folder_can_be_repeated(tmp_path: Path) -> None:
    def resume_from_a(run: RunConfig) -> dict[str, Any]:
        def work(comm: Comm) -> dict[str, Any]:
            return train(run, comm, tmp_path / "b", str(tmp_path / "a"))

        return run_ranks(1, work)[0]

    train_in_threads(tiny.run(epochs=1), tmp_path / "a")
    digests = set()
    for epochs in (2, 2, 3):
        run = tiny.run(epochs=epochs)
        digests.add(resume_from_a(run)["digest"])
    assert len(digests) == 2
    assert train_in_threads(tiny.run(epochs=3), tmp_path / "c")["digest"] in digests
