"""Tools of the tests of syncs: whole runs whose ranks are all replicas, and updates of one block.

`train_on(sync_run("daso", sync={"local-every": 2}), out, "aabb")`
    Trains the tiny run with four replicas on two nodes and returns the summary.
`update_block(sync, block, clock)`
    Applies one update to a block as the engine does, without a run around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from dtrain.block.block import Block
from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.config.run import RunConfig
from dtrain.syncs.base import Sync, UpdateClock
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


def clock_at(update: int, rows_per_replica: Sequence[int], **changes: Any) -> UpdateClock:
    """Return the clock of an update in a run of 100 updates in one epoch."""
    fields = {
        "update": update,
        "epoch": 0,
        "updates_per_epoch": 100,
        "total_updates": 100,
        "lr": 0.1,
        "base_lr": 0.1,
        "in_lr_warmup": False,
        "rows_per_replica": tuple(rows_per_replica),
    }
    return UpdateClock(**fields | changes)


def three_matrices() -> Block:
    """Return a block with a tall, a wide and a convolution's matrix, the same on every rank."""
    torch.manual_seed(0)
    layers = {"tall": nn.Linear(5, 9), "wide": nn.Linear(9, 4), "conv": nn.Conv2d(2, 6, 3)}
    doubles = {name: layer.double() for name, layer in layers.items()}
    return Block(0, doubles, None, partial(optim.Adam, lr=0.1))


def set_random_gradients(block: Block, update: int, replica: int) -> None:
    """Give each trained parameter a gradient of this update and replica."""
    for index, parameter in enumerate(block.trainable_parameters):
        generator = torch.Generator().manual_seed(1000 * update + 10 * index + replica)
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def update_block(sync: Sync, block: Block, clock: UpdateClock) -> None:
    """Apply one update with the gradients that the parameters hold. Collective over replicas."""
    rows = clock.rows_per_replica
    weight = rows[sync.replicas.rank] / sum(rows)
    block.set_lr_factor(sync.lr_factor(clock))
    sync.reduce_gradients(block, weight, clock)
    if sync.takes_step(weight, clock):
        block.update(sync.optimizer_step(clock))
    sync.after_update(clock)
