"""Asynchronous schedules over segments, replicas, restarts and recomputation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.run import RunConfig
from tests import tiny
from tests.harness import train_in_threads
from tests.outcome import break_off, close

SCHEDULES: dict[str, dict[str, Any]] = {
    "stash": {"name": "pipelined", "weights": "stash"},
    "velocity": {"name": "pipelined", "prediction": "velocity"},
    "difference": {"name": "pipelined", "prediction": "difference"},
    "spectrain": {"name": "pipelined", "prediction": "spectrain"},
    "both": {"name": "pipelined", "prediction": "velocity", "compensation": "spike"},
    "pipedream": {"name": "pipedream"},
    "vertical": {"name": "pipedream", "vertical-sync": True},
    "2bw": {"name": "pipedream-2bw"},
}


def make_run(name: str, **changes: Any) -> RunConfig:
    """Return a tiny run of four blocks; "2bw" has three micro-batches per update."""
    micros = 3 if name == "2bw" else 1
    return tiny.run(
        **{
            "objective__name": "backprop",
            "partition__blocks": 4,
            "schedule": SCHEDULES[name],
            "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
            "batch_size": 5 * micros,
            "micro_batches": micros,
            "mesh__stages": 2,
            "epochs": 1,
            **changes,
        }
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_trains_the_same_bits(name: str, tmp_path: Path) -> None:
    """Interrupted between two segments of an epoch: no state of a segment survives it."""
    run = make_run(name, checkpoint__every=2)
    uninterrupted = train_in_threads(run, tmp_path / "uninterrupted")
    shutil.copytree(tmp_path / "uninterrupted", tmp_path / "resumed")
    break_off(tmp_path / "resumed", 4)
    assert train_in_threads(run, tmp_path / "resumed")["digest"] == uninterrupted["digest"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_replicas_train_the_model_of_one(name: str, tmp_path: Path) -> None:
    """Delayed gradients are averaged too; the last update leaves one replica without samples."""
    uneven: dict[str, Any] = {"micro_batches": 3} if name == "2bw" else {"batch_size": 7}
    train_in_threads(make_run(name, **uneven), tmp_path / "one", 2)
    train_in_threads(make_run(name, **uneven), tmp_path / "two", 2, 2)
    close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["velocity", "pipedream"])
def test_recomputation_changes_no_bit(name: str, tmp_path: Path) -> None:
    """With a stash, a backward and its recomputed forward use the weights of the forward."""
    schedule = SCHEDULES[name] | {"weights": "stash"}
    without = train_in_threads(make_run(name, schedule=schedule), tmp_path / "without")
    recomputing = make_run(name, schedule=schedule, partition__recompute=True)
    recomputed = train_in_threads(recomputing, tmp_path / "recomputed")
    assert without["digest"] == recomputed["digest"]
