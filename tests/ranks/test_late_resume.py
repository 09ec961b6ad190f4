"""Late schedules over segments, replicas and restarts: what a drained pipeline keeps, and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.config.run import RunConfig
from dtrain.train import train
from tests import tiny
from tests.outcome import break_off, close

ALL: dict[str, dict[str, Any]] = {
    "stash": {"name": "pipelined", "weights": "stash"},
    "velocity": {"name": "pipelined", "prediction": "velocity"},
    "difference": {"name": "pipelined", "prediction": "difference"},
    "spectrain": {"name": "pipelined", "prediction": "spectrain"},
    "both": {"name": "pipelined", "prediction": "velocity", "compensation": "spike"},
    "pipedream": {"name": "pipedream"},
    "vertical": {"name": "pipedream", "vertical-sync": True},
    "2bw": {"name": "pipedream-2bw"},
}


def run(name: str, **told: Any) -> RunConfig:
    """Return a tiny run of four blocks; 2bw has three micro-batches an update."""
    micros = 3 if name == "2bw" else 1
    return tiny.run(
        **{
            "objective__name": "backprop",
            "partition__blocks": 4,
            "schedule": ALL[name],
            "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
            "batch_size": 5 * micros,
            "micro_batches": micros,
            "mesh__stages": 2,
            **told,
        }
    )


def trained(told: RunConfig, out: Path, count: int = 2) -> dict[str, Any]:
    return ranks(count, lambda comm: train(told, comm, out))[0]


@pytest.mark.parametrize("name", ALL)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    """Broken off between two segments of an epoch: nothing of a segment outlives it."""
    told = run(name, checkpoint__every=2)
    whole = trained(told, tmp_path / "whole")
    trained(told, tmp_path / "parts")
    break_off(tmp_path / "parts", 4)
    assert trained(told, tmp_path / "parts")["digest"] == whole["digest"]


@pytest.mark.parametrize("name", ALL)
def test_two_replicas_are_one(name: str, tmp_path: Path) -> None:
    """Gradients of both are averaged, late or not; the last update leaves a replica without any."""
    uneven: dict[str, Any] = {"micro_batches": 3} if name == "2bw" else {"batch_size": 7}
    trained(run(name, **uneven), tmp_path / "one", 2)
    trained(run(name, **uneven), tmp_path / "two", 4)
    close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["velocity", "pipedream"])
def test_what_is_computed_again_is_the_same(name: str, tmp_path: Path) -> None:
    """With a stash: a backward has the weights of its forward, and so has the second forward."""
    schedule = ALL[name] | {"weights": "stash"}
    one = trained(run(name, schedule=schedule), tmp_path / "kept")
    two = trained(run(name, schedule=schedule, partition__recompute=True), tmp_path / "again")
    assert one["digest"] == two["digest"]
