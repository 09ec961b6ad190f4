"""Laws of every sync, by its name in `SYNCS`; each holds for a new sync without a new test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.comm.backends.threads import run_ranks
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.schema import build_strategy
from dtrain.syncs import SYNCS, PeriodicSync, Sync, UpdateClock
from dtrain.testing.sync_updates import BlockHistory, train_block
from tests.outcome import model
from tests.ranks.sync_runs import sync_run, train_on

# ---- a warm-up without end is every-step

ENDLESS: dict[str, dict[str, Any]] = {
    "ab": {"warmup-updates": 99},
    "daso": {"warmup-epochs": 2},
    "local-sgd": {"warmup-updates": 99},
    "oialr": {"delay-updates": 99},
    "warmup": {"updates": 99, "inner": {"name": "local-sgd"}},
}
"""Syncs that have a warm-up of their own; the others are inside `warmup`."""

UNEQUAL = "aab"
"""Nodes of two replicas and one; one of them has no samples in the last update of an epoch."""


@pytest.fixture(scope="module")
def every_step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the plain run."""
    return train_on(sync_run("every-step"), tmp_path_factory.mktemp("every-step"), UNEQUAL)


@pytest.mark.parametrize("name", SYNCS)
def test_a_warm_up_without_end_is_every_step(
    name: str, every_step: dict[str, Any], tmp_path: Path
) -> None:
    """Bits and bytes, with Adam."""
    inside = {"inner": {"name": name}, "updates": 99}
    run = sync_run(name, sync=ENDLESS[name]) if name in ENDLESS else sync_run("warmup", sync=inside)
    summary = train_on(run, tmp_path, UNEQUAL)
    for key in ("digest", "bytes_inter_node", "bytes_intra_node"):
        assert summary[key] == every_step[key], key


# ---- resumed is uninterrupted

DASO = {"warmup-epochs": 1, "cooldown-epochs": 0, "max-global-skips": 2, "wait-factor": 1}
AB = {"warmup-updates": 1, "every": 4, "full-updates": 1, "rebound-updates": 2, "cutoff": 0.5}
DIGITS = {"keep": 2, "chunk": 4}
FIELDS: dict[str, dict[str, Any]] = {
    "ab": AB,
    "daso": DASO,
    "demo": DIGITS,
    "diloco": {"every": 3},
    "int8": {"inner": {"name": "diloco", "every": 3}},
    "local-sgd": {"every": 3, "warmup-updates": 2},
    "oialr": {"delay-updates": 3, "every": 2, "cutoff": 0.9, "share": 1.0, "rest-rounds": 1},
    "only-large": {"inner": {"name": "daso", **DASO}, "elements": 10},
    "powersgd": {"min-compression-rate": 1.0},
    "qsr": {"every": 2, "alpha-over-peak": 1.2},
    "terngrad": {"inner": {"name": "local-sgd", "every": 3}},
    "warmup": {"inner": {"name": "demo", **DIGITS}, "updates": 3},
}
"""Fields with which a sync does all that it can in six epochs of four updates."""

CASES = [
    *((name, FIELDS.get(name, {})) for name in SYNCS),
    *(("ab", AB | {"mode": mode}) for mode in ("with-stale", "full", "only-b")),
    ("daso", DASO | {"local-every": 2}),
    ("local-sgd", {"every": 3, "within": "node"}),
    *(
        ("powersgd", {"min-compression-rate": 1.0, "inner": {"name": inner, **FIELDS[inner]}})
        for inner in ("local-sgd", "diloco", "daso", "ab", "oialr")
    ),
    ("terngrad", {"inner": {"name": "daso", **DASO}}),
]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_resumed_after_every_update_is_uninterrupted(name: str, fields: dict[str, Any]) -> None:
    """Three replicas; the state of sync, block and optimizer goes to new ones after each update."""
    sync = build_strategy(SYNCS, {"name": name, **fields}, "sync")

    def train(*, restarts: bool) -> list[BlockHistory]:
        return run_ranks(
            3, lambda comm: train_block(comm, sync, restarts=restarts), hosts=list(UNEQUAL)
        )

    for ours, theirs in zip(train(restarts=True), train(restarts=False), strict=True):
        last = max(theirs.shown)
        for one, other in ((ours.final, theirs.final), (ours.shown[last], theirs.shown[last])):
            assert one.keys() == other.keys()
            for key, tensor in other.items():
                assert torch.equal(one[key], tensor), key


# ---- traits


@pytest.mark.parametrize("name", SYNCS)
def test_copies_of_parameters_are_planned_and_counted(name: str, tmp_path: Path) -> None:
    """Beside the memory of `every-step`: the sync's copies of all that is trained, on every rank,
    less the state of an optimizer that never steps."""
    run, plain = sync_run(name), sync_run("every-step")
    planned = [a - b for a, b in zip(planned_bytes(run), planned_bytes(plain), strict=True)]
    counted = [
        a - b
        for a, b in zip(
            train_on(run, tmp_path / "sync")["peak_memory_bytes"],
            train_on(plain, tmp_path / "plain")["peak_memory_bytes"],
            strict=True,
        )
    ]
    tensors, traits = model(tmp_path / "sync"), SYNCS[name]().traits()
    trained_bytes = 8 * sum(tensor.numel() for tensor in tensors.values())
    adam_bytes = 2 * trained_bytes + 4 * len(tensors)
    expected = traits.parameter_copies * trained_bytes
    expected -= adam_bytes if traits.keeps_no_optimizer_state else 0
    assert planned == [expected] * 2
    # Frozen bases and small cores need less memory than the matrices of the first updates.
    assert counted == planned or (name == "oialr" and counted < planned)


def planned_bytes(run: RunConfig) -> list[int]:
    return [memory.peak for memory in MemoryPlan(make_plan(run, 2)).rank_memory()]


@pytest.mark.parametrize(
    "name", [name for name in SYNCS if SYNCS[name]().traits().depends_on_run_length]
)
def test_another_length_is_refused_where_phases_follow_it(name: str, tmp_path: Path) -> None:
    train_on(sync_run(name, epochs=1), tmp_path)
    with pytest.raises(ConfigError):
        train_on(sync_run(name, epochs=2), tmp_path)


# ---- a user's own sync


class EveryFourth(PeriodicSync):
    """A plain class."""

    def is_due(self, clock: UpdateClock) -> bool:
        return (clock.update + 1) % 4 == 0


@dataclass
class EveryNth(PeriodicSync):
    """A dataclass with a key."""

    n: int = 2

    def is_due(self, clock: UpdateClock) -> bool:
        return (clock.update + 1) % self.n == 0


@pytest.mark.parametrize(("kind", "fields"), [(EveryFourth, {}), (EveryNth, {"n": 4})])
@pytest.mark.parametrize("wrapper", [None, "int8"])
def test_a_periodic_sync_needs_is_due_alone(
    kind: type[Sync],
    fields: dict[str, Any],
    wrapper: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is local SGD, to the bit, inside a compressing wrapper too."""
    monkeypatch.setitem(SYNCS, "mine", kind)

    def run(name: str, fields: dict[str, Any]) -> RunConfig:
        inner = {"inner": {"name": name, **fields}}
        return sync_run(wrapper, sync=inner) if wrapper else sync_run(name, sync=fields)

    mine = train_on(run("mine", fields), tmp_path / "mine")
    local = train_on(run("local-sgd", {"every": 4}), tmp_path / "local")
    assert mine["digest"] == local["digest"]
    assert mine["bytes_inter_node"] == local["bytes_inter_node"]
