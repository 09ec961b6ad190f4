"""One run on one rank: everything that `train` needs, made in order and agreed upon.

Invariant: nothing is written before every rank has accepted the run; each step is local work on
what all ranks share, so that all refuse or none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import torch

from dtrain import data, models
from dtrain.assembly import drawn
from dtrain.comm.comm import Comm
from dtrain.config import Run
from dtrain.course import Course
from dtrain.data import Data, updates_per_epoch
from dtrain.data import augment as augments
from dtrain.data.batches import Shares
from dtrain.data.reader import Reader
from dtrain.device import keep_freed, pick
from dtrain.engine import Engine
from dtrain.errors import DATA, Refusal
from dtrain.judge import Judge
from dtrain.layout import Layout, settle
from dtrain.mail import Lines, Seat
from dtrain.objectives.task import Task
from dtrain.schedules.check import Report
from dtrain.segments import Calendar

T = TypeVar("T")

EXAMINED = 8
"""Updates at an epoch's start that the proof and the drawing look at."""


@dataclass(frozen=True)
class Plan:
    """A run that fits its data and its ranks; the same on all of them.

    Attributes
    ----------
    run : Run
        Resolved: the numbers of blocks and stages are settled.
    blocks_assumed : bool
        Whether the number of blocks was taken from the stages.
    proof : Report
        What the schedule's proof saw.
    """

    run: Run
    data: Data
    layout: Layout
    calendar: Calendar
    shares: Shares
    proof: Report
    blocks_assumed: bool


@dataclass(frozen=True)
class Job:
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
    judge: Judge
    train: Reader
    test: Reader
    lines: Lines

    @property
    def seat(self) -> Seat:
        """This rank's place on the mesh."""
        return self.engine.mail.seat


def plan(run: Run, ranks: int) -> Plan:
    """Return the plan of `run` on a number of ranks, its order proven free of deadlock.

    Raises
    ------
    Refusal
        Data, model, mesh, partition or schedule do not fit each other.
    """
    samples = data.load(
        run.dataset.name, run.dataset.fields, run.folder, normalise=run.data.normalise
    )
    shape, classes = samples.train.shape, samples.train.classes
    augment = augments.make(run.data.augment, run.top.seed)
    if augment is not None:
        augment.check(shape)
    about = Task.about(shape, classes, samples.train.size, samples.train.span is not None)
    seen = run.make_objective().sees(shape, classes)
    model = models.load(run.model.name, run.model.fields, run.folder, seen, classes)
    layout = settle(run, model, about, ranks)
    top, coupling = run.top, layout.coupling
    calendar = Calendar.of(
        updates_per_epoch(samples.train.size, top.batch_size),
        top.epochs,
        top.updates,
        top.segment,
        run.checkpoint.every,
    )
    shares = Shares(top.batch_size, layout.mesh.replicas, top.micro_batches, 1 + bool(coupling))
    last = (samples.train.size - 1) % top.batch_size + 1
    if last < shares.least:
        raise Refusal(
            f"the last update of an epoch has 1 of {samples.train.size} samples, too few for the "
            f"batch statistics of layer '{coupling[0]}': set batch-size = {top.batch_size + 1} or "
            f"{max(top.batch_size - 1, 2)}"
        )
    fixed = run.fixed(len(layout.parts), layout.mesh.stages)
    proof = layout.prove(_sample(shares, samples.train.size, calendar.per_epoch))
    assumed = run.partition.blocks is None and run.partition.cuts is None
    return Plan(fixed, samples, layout, calendar, shares, proof, assumed)


def _sample(shares: Shares, size: int, updates: int) -> list[list[int]]:
    """Return ``[replica][update]`` micro-batches of an epoch's first updates and its last."""
    first = shares.sizes(size, 0, min(updates, EXAMINED))
    last = shares.sizes(size, max(updates - 1, 0), updates)
    return [head + tail for head, tail in zip(first, last, strict=True)]


def build(plan: Plan, comm: Comm) -> Job:
    """Make this rank's blocks, with the weights of the seed, and its communicators. Collective."""
    layout = plan.layout
    if plan.run.top.debug:
        comm.family.debug()
    replica, stage = layout.mesh.coords(comm.rank)
    seat = Seat(layout.mesh, replica, stage, layout.place)
    replicas, column = comm.split(stage, replica, "replicas"), comm.split(replica, stage, "column")
    lines = Lines(comm.dup("onward"), comm.dup("back"), comm, replicas, column)
    device = together(comm, lambda: pick(plan.run.top.device, comm.rank, comm.hosts))
    comm.onto(device)
    own = layout.blocks(stage)
    blocks = together(comm, lambda: {b: drawn(plan.run, layout, b, device) for b in own})
    syncs = {block: plan.run.make_sync() for block in blocks}
    for block, sync in syncs.items():
        sync.open(blocks[block], lines.replicas)
    course = _course(plan, device)
    engine, judge = Engine(seat, lines, blocks, syncs, course), Judge(seat, lines, blocks, course)
    augment = augments.make(plan.run.data.augment, plan.run.top.seed)
    train = Reader(plan.data.train, layout.dtype, augment)
    return Job(plan, engine, judge, train, Reader(plan.data.test, layout.dtype), lines)


def _course(plan: Plan, device: torch.device) -> Course:
    run, layout = plan.run, plan.layout
    return Course(
        layout.objective,
        layout.schedule,
        layout.tasks,
        rate=run.make_rate(),
        clip=run.step.clip,
        clips_model=run.step.clip > 0 and run.step.clip_over == "model",
        device=device,
        seed=run.top.seed,
        calendar=plan.calendar,
        parcel=layout.parcel,
    )


def alike(plan: Plan, comm: Comm) -> None:
    """Refuse data that are not the same on all ranks, as far as a sample shows. Collective.

    Stages read inputs and labels apart, so a data function that draws unseeded random numbers
    would pair the images of one rank with the labels of another.
    """
    rows = comm.exchange(_fingerprint(plan, comm.rank))
    labels = {row[0] for row in rows}
    inputs = {row[1] for row in rows if row[1] is not None}
    if len(labels) > 1 or len(inputs) > 1:
        what = "labels" if len(labels) > 1 else "inputs"
        raise Refusal(
            f"the ranks read different {what} from '{plan.run.dataset.name}': make the data the "
            "same in every process (seed whatever is random)",
            DATA,
            agreed=True,
        )


def _fingerprint(plan: Plan, rank: int) -> tuple[str, str | None]:
    """Return hashes of some labels, and of some inputs where this rank reads inputs."""
    _, stage = plan.layout.mesh.coords(rank)
    objective, tasks = plan.layout.objective, plan.layout.tasks
    own = [tasks[block] for block in plan.layout.blocks(stage)]
    reads = any(objective.reads(task, "train") or objective.reads(task, "predict") for task in own)
    labels, inputs = blake2b(), blake2b()
    for source in (plan.data.train, plan.data.test):
        some = np.unique(np.linspace(0, source.size - 1, 32).astype(np.int64))
        labels.update(str((source.size, source.shape, source.classes)).encode())
        labels.update(source.targets(some).numpy().tobytes())
        if reads:
            inputs.update(source.inputs(some).numpy().tobytes())
    return labels.hexdigest(), inputs.hexdigest() if reads else None


def together(comm: Comm, work: Callable[[], T]) -> T:
    """Return what `work` returns, unless it refuses on any rank: then all ranks refuse.

    Collective; `work` itself must not be.
    """
    refusal: Refusal | None = None
    result: list[T] = []
    try:
        result.append(work())
    except Refusal as error:
        refusal = error
    comm.agree(refusal)
    return result[0]


def threads(run: Run, comm: Comm) -> int:
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
        for host, cores in comm.exchange([comm.hosts[comm.rank], mine])
        if host == comm.hosts[comm.rank]
    ]
    share = len({core for cores in near for core in cores}) // len(near)
    asked = run.top.threads
    number = max(1, min(len(mine), share)) if asked == "auto" else asked
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    number = int(told) if told.isdigit() and int(told) else number
    torch.set_num_threads(number)
    keep_freed()
    with suppress(RuntimeError):  # it can be set once in a process
        torch.set_num_interop_threads(1)
    return number
