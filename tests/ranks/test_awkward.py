"""Models, data and restarts that are awkward: what they are told, and that the laws hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError
from dtrain.train import train
from tests import tiny
from tests.outcome import model, summary
from tests.ranks.test_laws import trained

MODELS = ["rebinding", "noisy", "writing", "normalised", "converting"]
BROKEN: dict[str, Any] = {
    "dtype": "float32",
    "optimizer": {"name": "sgd", "lr": 3e38, "weight-decay": 100.0},
}


def clipped() -> nn.Sequential:
    """Return a net whose first layer writes to what it is fed."""
    hidden = [nn.Linear(10, 12), nn.ReLU(inplace=True), nn.Linear(12, 8)]
    return nn.Sequential(
        nn.Flatten(), nn.Hardtanh(-0.5, 0.5, inplace=True), *hidden, nn.Linear(8, 3)
    )


@pytest.mark.parametrize("objective", tiny.NEIGHBOURS)
@pytest.mark.parametrize("name", MODELS)
def test_awkward_models_keep_laws_1_and_5(name: str, objective: str, tmp_path: Path) -> None:
    told = {"model": {"name": f"tests.tiny:{name}"}, "objective__name": objective}
    told |= {"partition__blocks": None, "partition__cuts": [2, 4]}
    whole = trained(tiny.run(**told), tmp_path / "1")
    for stages in (2, 3):
        trained(tiny.run(**told, mesh__stages=stages, epochs=1), tmp_path / f"{stages}", stages)
        parts = trained(tiny.run(**told, mesh__stages=stages), tmp_path / f"{stages}", stages)
        for key in ("digest", "test_loss", "test_accuracy_vote", "train_loss"):
            assert parts[key] == whole[key], key


@pytest.mark.parametrize("recompute", [False, True])
def test_nobody_writes_to_samples_that_several_blocks_read(recompute: bool, tmp_path: Path) -> None:
    """Three blocks on one rank share what is read, on three each has its own: the same bits."""
    part = {"cuts": [2, 4], "recompute": recompute}
    fields = {"objective__name": "infopro", "model": {"name": "tests.ranks.test_awkward:clipped"}}

    def digest(stages: int) -> Any:
        asked = tiny.run(**fields, partition=part, mesh__stages=stages)
        folder = tmp_path / str(stages)
        return ranks(stages, lambda comm: train(asked, comm, folder))[0]["digest"]

    assert digest(1) == digest(3)


def test_a_lone_sample_joins_its_neighbour_where_it_must(tmp_path: Path) -> None:
    """The last update has 2 samples for 3 replicas of 3 micro-batches."""
    run = tiny.run(model={"name": "tests.tiny:normalised"}, mesh__stages=1, partition__blocks=2)
    assert trained(run, tmp_path, 1, 3)["samples"] == 100
    with pytest.raises(DtrainError, match=r"1 of 50 samples.*layer '2': set batch-size = 8 or 6"):
        trained(replace(run, settings=replace(run.settings, batch_size=7)), tmp_path / "new")


def test_buffers_that_are_rebound_are_saved(tmp_path: Path) -> None:
    trained(tiny.run(model={"name": "tests.tiny:rebinding"}), tmp_path)
    assert model(tmp_path)["1.seen"].abs().sum() > 0


def test_data_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    run = tiny.run(data={"name": "tests.tiny:unseeded"}, mesh__stages=2)
    with pytest.raises(DtrainError, match="the ranks read different labels") as refusal:
        trained(run, tmp_path / "out", 2)
    assert refusal.value.code == 3
    assert not (tmp_path / "out").exists()


def test_weights_that_the_last_update_broke_end_the_run(tmp_path: Path) -> None:
    run = tiny.run(**BROKEN, epochs=None, updates=1)
    with pytest.raises(DtrainError, match=r"is not finite \[replica 0 stage 0\]") as refusal:
        trained(run, tmp_path)
    assert refusal.value.code == 4
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    assert summary(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("updates", [3, 7])
def test_a_run_that_is_found_finished_is_tested_where_it_ended(
    updates: int, tmp_path: Path
) -> None:
    """It was stopped after a checkpoint inside an epoch, and asked for just that length now."""
    told = {"checkpoint__every": 3, "epochs": None}
    straight = trained(tiny.run(**told, updates=updates), tmp_path / "straight")

    def stopped(comm: Comm) -> None:
        run = tiny.run(**told, updates=updates + 4)
        train(run, comm, tmp_path / "stopped")

    ranks(1, stopped)
    folders = sorted((tmp_path / "stopped" / "checkpoints").iterdir())
    for folder in folders:
        if int(folder.name[-8:]) > updates:
            folder.rename(tmp_path / folder.name)
    again = trained(tiny.run(**told, updates=updates), tmp_path / "stopped")
    if again["updates"] == straight["updates"]:
        for key in ("digest", "test_loss", "test_accuracy"):
            assert again[key] == straight[key], key
    assert again["test_loss"] is not None


@pytest.mark.parametrize("replicas", [1, 3])
def test_other_numbers_of_replicas_start_from_the_view(replicas: int, tmp_path: Path) -> None:
    """Law 5, second half, where replicas trained apart: what was evaluated is what goes on."""
    run = tiny.run(sync__name="never", mesh__stages=1)
    first = trained(run, tmp_path, 1, 2)
    again = trained(run, tmp_path, 1, replicas)
    assert again["test_loss"] == first["test_loss"]
    if replicas == 1:
        assert again["digest"] == first["digest"]
    longer = tiny.run(sync__name="never", mesh__stages=1, epochs=3)
    assert trained(longer, tmp_path, 1, replicas)["updates"] == 12


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    trained(tiny.run(), tmp_path)
    manifest = latest_checkpoint(tmp_path / "checkpoints")
    assert manifest is not None
    before = summary(tmp_path)
    shard = manifest.folder / "replica-0-stage-0.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DtrainError, match=r"replica-0-stage-0\.h5 is damaged") as refusal:
        trained(tiny.run(epochs=3), tmp_path)
    assert refusal.value.code == 5
    kept = {key: value for key, value in summary(tmp_path).items() if key in before}
    assert kept | {"status": "finished"} == before
    (manifest.folder / "manifest.json").write_text("{")
    with pytest.raises(DtrainError, match=r"manifest\.json is damaged"):
        trained(tiny.run(epochs=3), tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trained(tiny.run(), tmp_path)
    manifest = latest_checkpoint(tmp_path / "checkpoints")
    assert manifest is not None
    path = manifest.folder / "manifest.json"
    told = json.loads(path.read_text())
    told["run"]["model"]["widths"] = [12, 11, 7, 6]
    path.write_text(json.dumps(told))
    with pytest.raises(DtrainError, match=r"'model/fc1.weight' is \(13, 10\) float64"):
        trained(tiny.run(model__widths=[12, 11, 7, 6]), tmp_path)


def test_attempts_that_died_early_are_counted(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DtrainError, match=r"not finite|loss of block"):
            trained(tiny.run(**BROKEN), tmp_path)
    assert trained(tiny.run(), tmp_path)["attempts"] == 3


def test_stages_that_differ_keep_the_blocks_of_the_checkpoint(tmp_path: Path) -> None:
    run = tiny.run(partition__blocks=None, epochs=1)
    trained(tiny.run(partition__blocks=None, epochs=1, mesh__stages=3), tmp_path, 3)
    assert trained(run, tmp_path)["blocks"] == 3


def test_going_on_from_another_folder_can_be_repeated(tmp_path: Path) -> None:
    trained(tiny.run(epochs=1), tmp_path / "a")
    digests = set()
    for epochs in (2, 2, 3):
        run = tiny.run(epochs=epochs)
        told = ranks(1, lambda comm, run=run: train(run, comm, tmp_path / "b", str(tmp_path / "a")))
        digests.add(told[0]["digest"])
    assert len(digests) == 2
    assert trained(tiny.run(epochs=3), tmp_path / "c")["digest"] in digests
