"""All-reduces of gradients that start in the backward: the same bits, and really started there."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.engine.update import UpdateStep
from dtrain.schedules.actions import Action
from dtrain.syncs import gradient_reducer
from dtrain.syncs.gradient_reducer import GradientReducer, bucket_names
from tests import tiny
from tests.ranks.sync_runs import train_on

SYNCS: dict[str, dict[str, Any]] = {
    "every-step": {"name": "every-step"},
    "daso": {"name": "daso", "warmup-epochs": 1, "cooldown-epochs": 0},
    "local-sgd": {"name": "local-sgd", "within": "node", "every": 2, "warmup-updates": 3},
}
"""Syncs that average gradients, over all replicas or over those of a node."""

Events = list[tuple[str, ...]]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every parameter a bucket of its own."""
    monkeypatch.setattr(gradient_reducer, "BUCKET_BYTES", 1)


def tiny_run(stages: int, sync: str = "every-step", **changes: Any) -> RunConfig:
    """Return a tiny run; its last update of an epoch leaves some replicas without samples."""
    return tiny.run(mesh__stages=stages, sync=SYNCS[sync], **changes)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Record when backwards, all-reduces and updates start on replica 0."""
    recorded: Events = []
    gradient_hook, imean, step = UpdateStep.gradient_hook, Comm.imean_, UpdateStep.step

    def recorded_hook(self: UpdateStep, action: Action, *args: Any) -> Any:
        if self.syncs[action.block].replicas.rank == 0:
            recorded.append(("backward", str(action.block)))
        return gradient_hook(self, action, *args)

    def recorded_mean(self: Comm, tensors: Any, weight: float | None = None) -> Any:
        if isinstance(tensors, dict) and self.rank == 0:
            recorded.append(("mean", *tensors))
        return imean(self, tensors, weight)

    def recorded_step(self: UpdateStep, action: Action, *args: Any) -> None:
        if self.syncs[action.block].replicas.rank == 0:
            recorded.append(("step", str(action.block)))
        step(self, action, *args)

    monkeypatch.setattr(UpdateStep, "gradient_hook", recorded_hook)
    monkeypatch.setattr(Comm, "imean_", recorded_mean)
    monkeypatch.setattr(UpdateStep, "step", recorded_step)
    return recorded


@pytest.mark.parametrize(
    ("objective", "sync"),
    [*product(["backprop", "forward-forward"], ["every-step"]), *product(["mono-forward"], SYNCS)],
)
@pytest.mark.parametrize(("stages", "hosts"), [(1, "ab"), (1, "aabb"), (1, "abb"), (2, "aabb")])
def test_the_bits_are_those_of_one_mean_after_the_backward(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    sync: str,
    stages: int,
    hosts: str,
) -> None:
    """Three blocks on a rank, or on two; batches that leave a replica without samples."""
    run = tiny_run(stages, sync, objective__name=objective)
    overlapped = train_on(run, tmp_path / "overlapped", hosts)
    monkeypatch.setattr(gradient_reducer, "BUCKET_BYTES", 1 << 30)
    monkeypatch.setattr(GradientReducer, "gradient_ready", lambda *_: None)
    at_once = train_on(run, tmp_path / "at-once", hosts)
    for key in ("digest", "bytes_intra_node", "bytes_inter_node"):
        assert overlapped[key] == at_once[key]


def test_means_begin_inside_the_last_backward_from_the_last_layer_on(
    tmp_path: Path, events: Events
) -> None:
    """Two micro-batches, the first of which starts nothing."""
    changes: dict[str, Any] = {"objective__name": "backprop", "partition__blocks": 1}
    run = tiny_run(1, **changes, micro_batches=2, updates=1, epochs=None)
    train_on(run, tmp_path / "one", "a")
    assert events == [("backward", "0")] * 2 + [("step", "0")], "one replica averages nothing"
    events.clear()
    train_on(run, tmp_path / "two", "ab")
    layers = ["head", "fc4", "fc3", "fc2", "fc1"]
    means = [("mean", f"{layer}.{kind}") for layer in layers for kind in ("bias", "weight")]
    assert events == [("backward", "0"), ("backward", "0"), *means, ("step", "0")]


def test_blocks_on_one_rank_keep_to_the_plan_where_replicas_have_unequal_rows(
    tmp_path: Path, events: Events
) -> None:
    """50 samples leave two for four replicas: in that segment all means start in the updates."""
    train_on(tiny_run(1, epochs=1, segment=3), tmp_path, "aaab")
    kinds = [event[0] for event in events]
    assert kinds.index("mean") < kinds.index("step"), "the first segment has equal rows"
    backwards, means = kinds.count("backward"), kinds.count("mean")
    events.clear()
    train_on(tiny_run(1, epochs=1, segment=4), tmp_path / "whole", "aaab")
    kinds = [event[0] for event in events]
    assert kinds.index("mean") > kinds.index("step"), "now all is one segment"
    assert (kinds.count("backward"), kinds.count("mean")) == (backwards, means)


def test_buckets_hold_their_least_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_reducer, "BUCKET_BYTES", 24)
    sizes = {"a": 9, "b": 1, "c": 4, "d": 3, "e": 2}
    tensors = {name: torch.empty(size) for name, size in sizes.items()}
    assert bucket_names(tensors) == [["e", "d", "c"], ["b", "a"]]
    assert bucket_names({}) == []
