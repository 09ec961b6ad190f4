"""One run on one rank: everything that `train` needs, made in order and agreed upon.

Invariant: nothing is written before every rank has accepted the run; each step is local work on
what all ranks share, so that all refuse or none.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from dtrain.block.device import keep_freed_memory, select_device
from dtrain.comm.agree import all_or_none
from dtrain.comm.communicator import Comm
from dtrain.comm.groups import ProcessGroups
from dtrain.config.run import RunConfig
from dtrain.data import augment as augments
from dtrain.data.loader import Loader
from dtrain.engine.engine import Engine
from dtrain.engine.evaluator import Evaluator
from dtrain.engine.spec import EngineSpec
from dtrain.errors import DataError
from dtrain.mesh import RankPosition
from dtrain.planning.block_factory import make_block
from dtrain.planning.plan import Plan


@dataclass(frozen=True)
class RankJob:
    """A plan, and this rank's part in it.

    Attributes
    ----------
    engine, judge : Engine, Judge
        What trains, and what evaluates.
    train, test : Reader
        Through which they read.
    """

    plan: Plan
    engine: Engine
    evaluator: Evaluator
    train_loader: Loader
    test_loader: Loader
    groups: ProcessGroups

    @property
    def position(self) -> RankPosition:
        """This rank's place on the mesh."""
        return self.engine.router.position


def build_rank(plan: Plan, comm: Comm) -> RankJob:
    """Make this rank's blocks, with the weights of the seed, and its communicators. Collective."""
    layout = plan.layout
    if plan.run.settings.debug:
        comm.context.debug()
    replica, stage = layout.mesh.coords(comm.rank)
    seat = RankPosition(layout.mesh, replica, stage, layout.place)
    replicas, column = comm.split(stage, replica, "replicas"), comm.split(replica, stage, "column")
    lines = ProcessGroups(comm.dup("onward"), comm.dup("back"), comm, replicas, column)
    device = all_or_none(
        comm, lambda: select_device(plan.run.settings.device, comm.rank, comm.hosts)
    )
    comm.set_device(device)
    own = layout.blocks_of_stage(stage)
    blocks = all_or_none(comm, lambda: {b: make_block(plan.run, layout, b, device) for b in own})
    syncs = {block: plan.run.new_sync() for block in blocks}
    for block, sync in syncs.items():
        sync.setup(blocks[block], lines.replicas)
    course = _engine_spec(plan, device)
    engine, judge = (
        Engine(seat, lines, blocks, syncs, course),
        Evaluator(seat, lines, blocks, course),
    )
    augment = augments.build_augment(plan.run.data.augment, plan.run.settings.seed)
    train = Loader(plan.data.train, layout.dtype, augment)
    return RankJob(plan, engine, judge, train, Loader(plan.data.test, layout.dtype), lines)


def _engine_spec(plan: Plan, device: torch.device) -> EngineSpec:
    run, layout = plan.run, plan.layout
    return EngineSpec(
        layout.objective,
        layout.schedule,
        layout.block_specs,
        lr_schedule=run.lr_schedule.instance,
        clip=run.optimizer_options.clip,
        clips_model=run.optimizer_options.clip > 0 and run.optimizer_options.clip_over == "model",
        device=device,
        seed=run.settings.seed,
        training_length=plan.training_length,
        wire_format=layout.wire_format,
    )


def check_same_data(plan: Plan, comm: Comm) -> None:
    """Refuse data that are not the same on all ranks, as far as a sample shows. Collective.

    Stages read inputs and labels apart, so a data function that draws unseeded random numbers
    would pair the images of one rank with the labels of another.
    """
    rows = comm.allgather_object(_fingerprint(plan, comm.rank))
    labels = {row[0] for row in rows}
    inputs = {row[1] for row in rows if row[1] is not None}
    if len(labels) > 1 or len(inputs) > 1:
        what = "labels" if len(labels) > 1 else "inputs"
        raise DataError(
            "todo.key",
            f"the ranks read different {what} from '{plan.run.dataset.name}': make the data the "
            "same in every process (seed whatever is random)",
            agreed=True,
        )


def _fingerprint(plan: Plan, rank: int) -> tuple[str, str | None]:
    """Return hashes of some labels, and of some inputs where this rank reads inputs."""
    _, stage = plan.layout.mesh.coords(rank)
    objective, tasks = plan.layout.objective, plan.layout.block_specs
    own = [tasks[block] for block in plan.layout.blocks_of_stage(stage)]
    reads = any(
        objective.needs_samples(task, "train") or objective.needs_samples(task, "predict")
        for task in own
    )
    labels, inputs = blake2b(), blake2b()
    for source in (plan.data.train, plan.data.test):
        some = np.unique(np.linspace(0, source.size - 1, 32).astype(np.int64))
        labels.update(str((source.size, source.shape, source.classes)).encode())
        labels.update(source.targets(some).numpy().tobytes())
        if reads:
            inputs.update(source.inputs(some).numpy().tobytes())
    return labels.hexdigest(), inputs.hexdigest() if reads else None


def set_threads(run: RunConfig, comm: Comm) -> int:
    """Set and return torch's threads of this rank. Collective.

    ``OMP_NUM_THREADS``, where set, wins; then the run file's number; else the cores that the
    ranks of this host may use, divided by those ranks.
    """
    try:
        mine = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        mine = list(range(os.cpu_count() or 1))
    near = [
        cores
        for host, cores in comm.allgather_object([comm.hosts[comm.rank], mine])
        if host == comm.hosts[comm.rank]
    ]
    share = len({core for cores in near for core in cores}) // len(near)
    asked = run.settings.threads
    number = max(1, min(len(mine), share)) if asked == "auto" else asked
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    number = int(told) if told.isdigit() and int(told) else number
    torch.set_num_threads(number)
    keep_freed_memory()
    with suppress(RuntimeError):  # it can be set once in a process
        torch.set_num_interop_threads(1)
    return number
