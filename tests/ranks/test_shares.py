"""`[mesh] shares`: replicas of unequal speed have unequal parts of each update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.data.sampler import BatchSplitter
from dtrain.errors import ConfigError
from dtrain.evaluation import evaluate_run
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.planning.report import plan_text
from dtrain.run_report.plan_file import parse_plan
from tests import tiny
from tests.harness import assert_close_model, train_in_threads
from tests.ranks.test_memory import make_run
from tests.refusals import refuses

SHARES = [3, 1, 2]


@pytest.mark.parametrize("min_rows", [1, 2])
@pytest.mark.parametrize("shares", [(3, 1, 2), (1, 100), (7,), (1, 1, 1), (5, 5, 5, 5, 5)])
def test_parts_are_in_proportion_to_the_shares(shares: tuple[int, ...], min_rows: int) -> None:
    """Every sample once, in order, each part within one sample of the exact one; equal shares are
    the parts without shares. No part is shorter than the fewest samples if there is a cure."""
    order = np.arange(60)
    for size in range(1, 60):
        splitter = BatchSplitter(size, len(shares), 2, min_rows, shares)
        equal = BatchSplitter(size, len(shares), 2, min_rows)
        batches = [splitter.batch(order, 0, replica) for replica in range(len(shares))]
        rows = batches[0].replica_rows
        parts = [part for batch in batches for part in batch.micro_batch_indices]
        assert np.concatenate(parts).tolist() == list(range(size))
        assert size < min_rows or min(map(len, parts)) >= min_rows
        if len(set(shares)) == 1:
            assert rows == equal.batch(order, 0, 0).replica_rows
        else:
            assert splitter.largest_micro_batch == max(map(len, parts))
        exact = [size * share / sum(shares) for share in shares]
        if min_rows == 1 or min(exact) >= min_rows:
            assert max(abs(n - part) for n, part in zip(rows, exact, strict=True)) < 1


@pytest.mark.parametrize(
    ("objective", "sync", "stages"),
    [
        ("backprop", {"name": "every-step"}, 2),
        ("forward-forward", {"name": "warmup", "updates": 3}, 1),
        ("cafo", {"name": "only-large"}, 1),
        ("dni", {"name": "every-step"}, 3),
    ],
)
def test_shares_decide_the_speed_alone(
    objective: str, sync: dict[str, Any], stages: int, tmp_path: Path
) -> None:
    """Law 1 over replicas with shares, the last batch too small for all; resumed with others."""
    run = tiny.run(objective__name=objective, sync=sync, mesh__stages=stages)
    half = tiny.run(
        objective__name=objective, sync=sync, epochs=1, mesh={"stages": stages, "shares": SHARES}
    )
    other = tiny.run(
        objective__name=objective, sync=sync, mesh={"stages": stages, "shares": [1, 5]}
    )
    train_in_threads(run, tmp_path / "one", stages)
    train_in_threads(half, tmp_path / "many", stages, 3)
    summary = train_in_threads(other, tmp_path / "many", stages, 2)
    rtol = 1e-9 if objective in ("cafo", "dni") else 1e-12
    assert_close_model(tmp_path / "one", tmp_path / "many", rtol)
    metrics = evaluate_run(tmp_path / "many", Comm(SingleBackend()))
    assert metrics["loss"] == summary["test_loss"]


def test_memory_is_planned_by_shares(tmp_path: Path) -> None:
    """Within 10 % on every rank; the plan file says the shares."""
    mesh = {"stages": 2, "shares": [7, 1]}
    partition = {"blocks": 3, "balance": "layers"}
    run = make_run("resnet", "backprop", "1f1b", mesh=mesh, partition=partition)
    plan = make_plan(run, 4)
    planned = [memory.peak for memory in MemoryPlan(plan).rank_memory()]
    counted = train_in_threads(run, tmp_path, 2, 2)["peak_memory_bytes"]
    assert planned[0] > 1.2 * planned[2]
    for planned_bytes, counted_bytes in zip(planned, counted, strict=True):
        assert abs(planned_bytes / counted_bytes - 1) < 0.1, (planned, counted)
    read = parse_plan(plan_text(plan))
    assert read.mesh == plan.layout.mesh
    assert read.rows_per_micro_batch == plan.batch_splitter.largest_micro_batch


@pytest.mark.parametrize(
    ("shares", "sync", "key"),
    [
        ([2, 1], "every-step", "mesh.shares-length"),
        ([2, 0, 1], "every-step", "mesh.share-too-small"),
        ([2, -1, 1], "every-step", "mesh.share-too-small"),
        ([], "every-step", "mesh.share-too-small"),
        ([2, 1, 1], "local-sgd", "mesh.shares-sync"),
        ([2, 1, 1], "demo", "mesh.shares-sync"),
        ([2, 2, 2], "local-sgd", None),
        ([2, 1, 1], "powersgd", None),
    ],
)
def test_shares_that_are_refused(shares: list[int], sync: str, key: str | None) -> None:
    """From a run file, and from Python, where a script may run on other ranks."""
    changes = {"mesh": {"stages": 2, "shares": shares}, "sync": {"name": sync}}
    if key is None:
        run = tiny.run(**changes)
        assert make_plan(run.fit_stages(6), 6).layout.mesh.shares == tuple(shares)
        assert make_plan(run.fit_stages(4), 4).layout.mesh.shares == ()
    else:
        with refuses(ConfigError, key):
            make_plan(tiny.run(**changes), 6)
