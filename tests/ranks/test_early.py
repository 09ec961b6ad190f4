"""Means of gradients that begin in the backward: the same bits, and really begun there."""

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
from dtrain.syncs import gradient_reducer as early
from dtrain.syncs.gradient_reducer import GradientReducer, bucket_names
from tests import tiny
from tests.ranks.test_rounds import trained

SYNCS: dict[str, dict[str, Any]] = {
    "every-step": {"name": "every-step"},
    "daso": {"name": "daso", "warmup-epochs": 1, "cooldown-epochs": 0},
    "local-sgd": {"name": "local-sgd", "within": "node", "every": 2, "warmup-updates": 3},
}
"""Those that average gradients, over all replicas or over those of a node."""

Events = list[tuple[str, ...]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a bucket for every parameter."""
    monkeypatch.setattr(early, "BUCKET_BYTES", 1)


def run(stages: int, sync: str = "every-step", **told: Any) -> RunConfig:
    """Return a tiny run whose last updates of an epoch leave some replicas without a sample."""
    return tiny.run(mesh__stages=stages, sync=SYNCS[sync], **told)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Note of replica 0 what begins: backwards, means of gradients, updates."""
    noted: Events = []
    heard, imean, step = UpdateStep.gradient_hook, Comm.imean_, UpdateStep.step

    def learning(self: UpdateStep, action: Action, *args: Any) -> Any:
        if self.syncs[action.block].replicas.rank == 0:
            noted.append(("learn", str(action.block)))
        return heard(self, action, *args)

    def meaning(self: Comm, tensors: Any, weight: float | None = None) -> Any:
        if isinstance(tensors, dict) and self.rank == 0:
            noted.append(("mean", *tensors))
        return imean(self, tensors, weight)

    def stepping(self: UpdateStep, action: Action, *args: Any) -> None:
        if self.syncs[action.block].replicas.rank == 0:
            noted.append(("step", str(action.block)))
        step(self, action, *args)

    monkeypatch.setattr(UpdateStep, "gradient_hook", learning)
    monkeypatch.setattr(Comm, "imean_", meaning)
    monkeypatch.setattr(UpdateStep, "step", stepping)
    return noted


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
    """Three blocks on a rank, or on two; batches that leave a replica without a sample."""
    told = run(stages, sync, objective__name=objective)
    one = trained(told, tmp_path / "early", hosts)
    monkeypatch.setattr(early, "BUCKET_BYTES", 1 << 30)
    monkeypatch.setattr(GradientReducer, "gradient_ready", lambda *_: None)
    two = trained(told, tmp_path / "late", hosts)
    assert one["digest"] == two["digest"]
    for key in ("bytes_intra_node", "bytes_inter_node"):
        assert one[key] == two[key]


def test_means_begin_inside_the_last_backward_from_the_last_layer_on(
    tmp_path: Path, events: Events
) -> None:
    """One of two replicas notes: two micro-batches, the first of which begins nothing."""
    changes: dict[str, Any] = {"objective__name": "backprop", "partition__blocks": 1}
    told = run(1, **changes, micro_batches=2, updates=1, epochs=None)
    trained(told, tmp_path / "one", "a")
    assert events == [("learn", "0")] * 2 + [("step", "0")], "one replica has no mean"
    events.clear()
    trained(told, tmp_path / "two", "ab")
    layers = ["head", "fc4", "fc3", "fc2", "fc1"]
    means = [("mean", f"{each}.{kind}") for each in layers for kind in ("bias", "weight")]
    assert events == [("learn", "0"), ("learn", "0"), *means, ("step", "0")]


def test_blocks_on_one_rank_keep_to_the_plan_where_shares_differ(
    tmp_path: Path, events: Events
) -> None:
    """50 samples leave two for four replicas: in that segment all means begin in their updates."""
    trained(run(1, epochs=1, segment=3), tmp_path, "aaab")
    kinds = [each[0] for each in events]
    assert kinds.index("mean") < kinds.index("step"), "the first segment shares evenly"
    learns, means = kinds.count("learn"), kinds.count("mean")
    events.clear()
    trained(run(1, epochs=1, segment=4), tmp_path / "whole", "aaab")
    kinds = [each[0] for each in events]
    assert kinds.index("mean") > kinds.index("step"), "now all is one segment"
    assert (kinds.count("learn"), kinds.count("mean")) == (learns, means)


def test_buckets_hold_their_least_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "BUCKET_BYTES", 24)
    values = {name: torch.empty(size) for name, size in zip("abcde", (9, 1, 4, 3, 2), strict=True)}
    assert bucket_names(values) == [["e", "d", "c"], ["b", "a"]]
    assert bucket_names({}) == []
