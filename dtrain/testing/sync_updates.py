"""Updates of one block under a sync, without a run around it: every rank is a replica.

`update_block(sync, block, clock)` applies one update as the engine does; `train_block(comm, sync)`
trains for six epochs of four updates with made-up gradients, in a few milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim

from dtrain.block.block import Block
from dtrain.comm.communicator import Comm
from dtrain.rng import seeded
from dtrain.syncs.base import Sync, UpdateClock

UPDATES, UPDATES_PER_EPOCH = 24, 4


Snapshot = dict[str, Tensor]
"""What a checkpoint holds of one rank: tensors by "block/...", "optimizer/...", "sync/..."."""


@dataclass
class BlockHistory:
    """A block's training in one replica.

    Attributes
    ----------
    final : dict of str to Tensor
        The snapshot at the end.
    in_sync : dict of int to (dict of str to Tensor, or None)
        After each update: the trained parameters where the sync says that all replicas hold the
        same, else None.
    segment_ends : dict of int to dict of str to Tensor
        The trained parameters after `finish_pending`, by update.
    shown : dict of int to dict of str to Tensor
        The evaluation weights at the end of each epoch, by update.
    changed_by_evaluation : list of str
        Names of tensors that `evaluation_weights` has changed.
    peak_copies : float
        The most bytes that the sync held, in units of the trained parameters.
    bytes_sent : int
        Bytes that this replica sent, evaluations apart.
    """

    final: Snapshot = field(default_factory=dict)
    in_sync: dict[int, Snapshot | None] = field(default_factory=dict)
    segment_ends: dict[int, Snapshot] = field(default_factory=dict)
    shown: dict[int, Snapshot] = field(default_factory=dict)
    changed_by_evaluation: list[str] = field(default_factory=list)
    peak_copies: float = 0.0
    bytes_sent: int = 0


def train_block(comm: Comm, sync: Sync, *, restarts: bool = False) -> BlockHistory:
    """Train `three_matrices` under copies of a sync. Collective over the replicas.

    Some replicas have no samples in the last update of an epoch.

    Parameters
    ----------
    restarts : bool
        Whether the state of sync, block and optimizer goes to new ones after each update.
    """
    history = BlockHistory()
    own_sync, block = attach_block(comm, sync)
    for update in range(UPDATES):
        set_random_gradients(block, update, comm.rank)
        clock = _clock_of(update, comm.size)
        update_block(own_sync, block, clock)
        in_sync = own_sync.in_sync
        history.in_sync[update] = _copies(block.trainable_tensors()) if in_sync else None
        history.peak_copies = max(history.peak_copies, _held_copies(own_sync, block))
        if clock.ends_epoch:
            own_sync.finish_pending()
            own_sync.end_epoch(1.0)
            history.segment_ends[update] = _copies(block.trainable_tensors())
            _evaluate(own_sync, block, history, update)
        if restarts:
            saved = snapshot(own_sync, block)
            own_sync, block = attach_block(comm, sync)
            restore_snapshot(own_sync, block, saved)
    history.final = snapshot(own_sync, block)
    history.bytes_sent = comm.traffic.bytes_intra + comm.traffic.bytes_inter
    return history


def _clock_of(update: int, replicas: int) -> UpdateClock:
    """Return the clock of an update of `train_block`."""
    is_short = update % UPDATES_PER_EPOCH == UPDATES_PER_EPOCH - 1
    full, short = (2, 2, 1), (2, 1, 0)
    rows = [(short if is_short else full)[replica % 3] for replica in range(replicas)]
    return clock_at(
        update,
        rows,
        epoch=update // UPDATES_PER_EPOCH,
        updates_per_epoch=UPDATES_PER_EPOCH,
        total_updates=UPDATES,
        lr=0.1 / (1 + update // 3),
    )


def _evaluate(sync: Sync, block: Block, history: BlockHistory, update: int) -> None:
    """Record the evaluation weights, and the tensors that the evaluation changes."""
    with sync.replicas.without_counting():
        before = snapshot(sync, block)
        history.shown[update] = _copies(sync.evaluation_weights())
        after = snapshot(sync, block)
    history.changed_by_evaluation += [
        name for name, tensor in before.items() if not torch.equal(tensor, after[name])
    ]


def _held_copies(sync: Sync, block: Block) -> float:
    """Return the bytes of the tensors that a sync holds, in units of the trained parameters."""
    own = [*block.tensors().values(), *block.optimizer_state().values()]
    own_storages = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors_in(sync, {})
    }
    held = sum(size for place, size in storages.items() if place not in own_storages)
    return held / sum(parameter.nbytes for parameter in block.trainable_parameters)


def _tensors_in(item: object, visited: dict[int, object]) -> Iterator[Tensor]:
    """Yield the tensors that an object refers to, itself or through others."""
    if id(item) in visited or isinstance(item, Block | Comm | type):
        return
    visited[id(item)] = item
    parts: Iterable[object] = ()
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        parts = item.values()
    elif isinstance(item, list | tuple | set | frozenset):
        parts = item
    elif hasattr(item, "__dict__") and not callable(item):
        parts = vars(item).values()
    for part in parts:
        yield from _tensors_in(part, visited)


def clock_at(update: int, rows_per_replica: Sequence[float], **changes: Any) -> UpdateClock:
    """Return the clock of an update in a run of 100 updates in one epoch."""
    fields: dict[str, Any] = {
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
    with seeded(0, "three matrices"):
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


def attach_block(comm: Comm, sync: Sync) -> tuple[Sync, Block]:
    """Return a copy of a sync, set up with a new block. Collective over the replicas."""
    own_sync, block = copy.deepcopy(sync), three_matrices()
    own_sync.setup(block, comm)
    return own_sync, block


def snapshot(sync: Sync, block: Block) -> Snapshot:
    """Return copies of all that a checkpoint holds of this rank. Collective over the replicas."""
    sync.finish_pending()
    parts = {"block": block.tensors(), "optimizer": block.optimizer_state(), "sync": sync.state()}
    return {
        f"{part}/{name}": tensor.clone()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def restore_snapshot(sync: Sync, block: Block, saved: Mapping[str, Tensor]) -> None:
    """Load a snapshot in the order of `dtrain.checkpoint.store.restore`."""
    parts: dict[str, dict[str, Tensor]] = {"block": {}, "optimizer": {}, "sync": {}}
    for key, tensor in saved.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor.clone()
    sync.restore_shapes(parts["sync"])
    for name, tensor in block.tensors().items():
        tensor.copy_(parts["block"][name])
    block.load_optimizer_state(parts["optimizer"])
    sync.restore(parts["sync"])


def _copies(tensors: Mapping[str, Tensor]) -> Snapshot:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
