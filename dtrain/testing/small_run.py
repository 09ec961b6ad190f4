"""Small runs, with ranks as threads of this process and without a run folder.

Invariant: 50 samples in batches of 16 leave a last batch of 2, so that no number of replicas or
micro-batches up to four divides everything. Each rank has copies of the strategies, as a process
would.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dtrain.build import RankJob, build_rank
from dtrain.checkpoint import store
from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.parse import parse_run
from dtrain.config.run import RunConfig
from dtrain.config.validate import validate_run
from dtrain.evaluation import evaluate_weights, evaluation_weights
from dtrain.objectives.base import Objective
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import Plan, make_plan
from dtrain.schedules.base import Schedule
from dtrain.schedules.segments import Segment
from dtrain.schema import Table
from dtrain.syncs.base import Sync

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


UPDATES_PER_EPOCH = 4
"""Updates of an epoch of the small run."""


class Net(NamedTuple):
    """Data and model of a small run, as the tables of a run file."""

    data: str
    model: Table
    loss: str = "cross-entropy"


NETS = {
    "vectors": Net("vectors", {"name": "mlp", "widths": [9, 7, 6]}),
    "numbers": Net("numbers", {"name": "mlp", "widths": [9, 7, 6]}, "mse"),
    "images": Net("images", {"name": "cnn", "widths": [[4], [6], [8]], "norm": "none"}),
}
"""Three blocks each: the first two layers, and all the rest."""


WIDE_NETS = {
    "vectors": Net("wide_vectors", {"name": "mlp", "widths": [96, 80, 64, 48]}),
    "numbers": Net("wide_numbers", {"name": "mlp", "widths": [96, 80, 64, 48]}, "mse"),
    "images": Net("wide_images", {"name": "cnn", "widths": [[8] * 5, [12] * 4], "norm": "none"}),
}
"""Nets whose activations are a good part of the memory."""


def vectors() -> Arrays:
    """Return 50 training and 17 test samples of 2 x 5 numbers around three centres."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 67)
    return _split(random.normal(size=(3, 2, 5))[y] + random.normal(size=(67, 2, 5)), y)


def numbers() -> Arrays:
    """Return samples of 2 x 5 numbers with three real numbers each."""
    x = np.random.default_rng(1).normal(size=(67, 2, 5))
    return _split(x, np.stack([x[:, 0, 0] ** 2, x[:, 1, 1] - x[:, 0, 2], x[:, 1, 4]], 1))


def images() -> Arrays:
    """Return images (2, 8, 8) with one class of three each."""
    random = np.random.default_rng(2)
    y = random.integers(0, 3, 67)
    centres = random.normal(size=(3, 2, 8, 8))
    return _split(centres[y] + random.normal(size=(67, 2, 8, 8)), y)


def wide_vectors() -> Arrays:
    """Return 160 training and 24 test samples of 432 numbers with one class of five each."""
    x, y, x_test, y_test = wide_images()
    return x.reshape(160, -1), y, x_test.reshape(24, -1), y_test


def wide_numbers() -> Arrays:
    """Return the samples of `wide_vectors` with five real numbers each."""
    x, _, x_test, _ = wide_vectors()
    return x, x[:, :5].copy(), x_test, x_test[:, :5].copy()


def wide_images() -> Arrays:
    """Return 160 training and 24 test images (3, 12, 12) with one class of five each."""
    random = np.random.default_rng(3)
    x, y = random.normal(size=(184, 3, 12, 12)).astype("float32"), random.integers(0, 5, 184)
    return x[:160], y[:160], x[160:], y[160:]


def _split(x: NDArray[Any], y: NDArray[Any]) -> Arrays:
    return x[:50], y[:50], x[50:], y[50:]


@dataclass(frozen=True)
class Strategies:
    """The strategies of a small run; a schedule of None is the objective's default one."""

    objective: Objective
    schedule: Schedule | None = None
    sync: Sync | None = None


def make_run(net: Net, strategies: Strategies, **changes: Any) -> RunConfig:
    """Return a run of two epochs, checked.

    Parameters
    ----------
    changes : dict
        Keys of the run file in snake_case, and tables.
    """
    table: Table = {
        "seed": 3,
        "epochs": 2,
        "batch-size": 16,
        "micro-batches": 3,
        "dtype": "float64",
        "threads": 1,
        "data": {"name": f"{__name__}:{net.data}"},
        "task": {"loss": net.loss},
        "model": net.model,
        "partition": {"cuts": [1, 2]},  # named, since balancing costs every possible cut
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "schedule": {"name": strategies.objective.default_schedule},
        "log": {"every-s": 1000},
    }
    table |= {name.replace("_", "-"): value for name, value in changes.items()}
    run = parse_run(table, Path.cwd() / "testing.toml")
    parts: dict[str, Any] = {
        "objective": strategies.objective,
        "schedule": strategies.schedule,
        "sync": strategies.sync,
    }
    run = replace(run, **{name: part for name, part in parts.items() if part is not None})
    validate_run(run)
    return run


class Outcome(NamedTuple):
    """The end of a small run.

    Attributes
    ----------
    weights : list of dict of str to Tensor
        The evaluation weights of each replica.
    losses : list of dict of str to float
        The sums of the losses of each replica, by segment and block.
    evaluation : dict
        Loss and accuracies over the test split.
    planned_bytes, counted_bytes : list of int
        Peak memory of each rank.
    bytes_sent : int
        Bytes that all ranks sent in training.
    """

    weights: list[dict[str, Tensor]]
    losses: list[dict[str, float]]
    evaluation: dict[str, Any]
    planned_bytes: list[int]
    counted_bytes: list[int]
    bytes_sent: int


def train(
    run: RunConfig,
    stages: int = 1,
    replicas: int = 1,
    *,
    hosts: Sequence[str] | None = None,
    seed: int = 0,
    prepare: Callable[[RankJob], None] | None = None,
    folder: Path | None = None,
    stop_after: int | None = None,
    plans_memory: bool = False,
) -> Outcome:
    """Train a small run on stages x replicas threads.

    Parameters
    ----------
    hosts : sequence of str, optional
        The host of every rank; one host by default.
    seed : int
        Of the order in which the threads take turns.
    prepare : callable, optional
        Called on every rank before the first update.
    folder : Path, optional
        Where a checkpoint is read, if there is one, and written at the end.
    stop_after : int, optional
        The segments after which this start ends.
    """
    run = replace(run, mesh=replace(run.mesh, stages=stages))
    plan = make_plan(run, stages * replicas)

    def train_rank(comm: Comm) -> dict[str, Any]:
        return _train_rank(_own_copy(plan), comm, prepare, folder, stop_after)

    records = run_ranks(
        stages * replicas, train_rank, seed=seed, hosts=None if hosts is None else list(hosts)
    )
    weights: list[dict[str, Tensor]] = [{} for _ in range(replicas)]
    losses: list[dict[str, float]] = [{} for _ in range(replicas)]
    for record in records:
        weights[record["replica"]] |= record["weights"]
        losses[record["replica"]] |= record["losses"]
    planned = MemoryPlan(plan).rank_memory() if plans_memory else []
    return Outcome(
        weights,
        losses,
        records[0]["evaluation"],
        [memory.peak for memory in planned],
        [record["peak_bytes"] for record in records],
        sum(record["bytes_sent"] for record in records),
    )


def _own_copy(plan: Plan) -> Plan:
    """Return a plan whose strategies belong to one rank alone."""
    layout, run = plan.layout, plan.run
    objective, schedule = copy.deepcopy((layout.objective, layout.schedule))
    sync = replace(run.sync, instance=run.new_sync())
    layout = replace(layout, objective=objective, schedule=schedule)
    return replace(plan, layout=layout, run=replace(run, sync=sync))


def _train_rank(
    plan: Plan,
    comm: Comm,
    prepare: Callable[[RankJob], None] | None,
    folder: Path | None,
    stop_after: int | None,
) -> dict[str, Any]:
    """Train one rank; return what it found. Collective over all ranks."""
    job = build_rank(plan, comm)
    done = _restore(job, folder)
    if prepare is not None:
        prepare(job)
    losses: dict[str, float] = {}
    for segment in itertools.islice(plan.training_length.segments(done), stop_after):
        sums = _train_segment(job, segment)
        losses |= {f"{segment.start}, block {block}": loss for block, loss in sums.items()}
        done = segment.stop
    traffic = comm.traffic
    bytes_sent = traffic.bytes_intra + traffic.bytes_inter
    eval_weights = evaluation_weights(job)
    if folder is not None:
        _save(job, eval_weights, folder, done)
    weights = {
        name: tensor.detach().clone()
        for tensors in eval_weights.values()
        for name, tensor in tensors.items()
    }
    evaluation = evaluate_weights(job, eval_weights, job.test_loader, plan.batch_splitter)
    return {
        "replica": job.position.replica,
        "weights": weights,
        "losses": losses,
        "evaluation": evaluation,
        "peak_bytes": job.engine.peak_bytes(),
        "bytes_sent": bytes_sent,
    }


def _train_segment(job: RankJob, segment: Segment) -> dict[int, float]:
    """Train a segment; return the sums of the losses by block. Collective over all ranks."""
    plan, replica = job.plan, job.position.replica
    length, order = segment.stop - segment.start, plan.epoch_order(segment.epoch)
    batches = [
        plan.batch_splitter.batch(order, offset, replica)
        for offset in range(segment.offset, segment.offset + length)
    ]
    for _ in job.engine.run(job.train_loader, batches, segment.start, segment.epoch):
        pass
    for sync in job.engine.syncs.values():
        sync.finish_pending()
        if segment.ends_epoch:
            sync.end_epoch(1.0)
    return dict(job.engine.metric_sums.loss)


def _restore(job: RankJob, folder: Path | None) -> int:
    """Load the newest checkpoint of a folder, if there is one; return its updates."""
    manifest = None if folder is None else latest_checkpoint(folder)
    if manifest is None:
        return 0
    store.restore(manifest, job.engine.blocks, job.engine.syncs, job.position.replica)
    return int(manifest.state["update"])


def _save(job: RankJob, eval_weights: Any, folder: Path, update: int) -> None:
    """Write a checkpoint. Collective over all ranks."""
    replica, stage = job.position.replica, job.position.stage
    tensors = store.collect_tensors(job.engine.blocks, job.engine.syncs, eval_weights, replica)
    shard, state = f"replica-{replica}-stage-{stage}", {"update": update}
    store.save(folder, shard, tensors, {}, state, job.groups.control, keep=2)
