"""Tools of the tests of syncs: whole runs whose ranks are all replicas.

`train_on(sync_run("daso", sync={"local-every": 2}), out, "aabb")`
    Trains the tiny run with four replicas on two nodes and returns the summary.

`dtrain.testing.sync_updates` has the tools for updates of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.config.run import RunConfig
from tests import tiny
from tests.harness import train_in_threads

FOUR = "aabb"
"""The hosts of four replicas on two nodes."""

UPDATES = 8
"""Updates of the tiny run."""

WIDE: dict[str, Any] = {"model__widths": [40, 30, 20]}
"""Matrices that are large enough to be compressed or factorized."""

SGD: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.05}}
MOMENTUM: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}


def sync_run(name: str, **changes: Any) -> RunConfig:
    """Return the tiny run under a sync, with all ranks as replicas; `sync` has its fields."""
    fields = {"name": name, **changes.pop("sync", {})}
    return tiny.run(mesh__stages=1, sync=fields, **changes)


def train_on(
    run: RunConfig, out: Path, hosts: Sequence[str] = "ab", seed: int = 0
) -> dict[str, Any]:
    """Train with one rank as a thread for each host and return the summary.

    `seed` is that of the order in which the threads take turns.
    """
    return train_in_threads(run, out, 1, len(hosts), hosts=hosts, seed=seed)


def replica_tensors(out: Path, count: int) -> list[dict[str, Tensor]]:
    """Return the tensors of each replica in the newest checkpoint."""
    manifest = latest_checkpoint(out / "checkpoints")
    assert manifest is not None
    return [manifest.load_prefix(f"replica/{replica}/") for replica in range(count)]
