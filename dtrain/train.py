"""`train()`: one run, from a checked run file to its summary, from top to bottom.

Invariant: until the first segment every refusal is agreed upon, so all ranks refuse or none; from
then on the first rank that fails ends the job. Everything collective happens at a segment's end.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain import checkpoint, folder, report
from dtrain.comm.comm import Comm
from dtrain.config import Run
from dtrain.data import order
from dtrain.errors import Refusal, Stopped, sign, words
from dtrain.exam import Views, grade, resolved, views
from dtrain.folder import FLIGHT
from dtrain.job import Job, Plan, alike, build, plan, threads, together
from dtrain.progress import Progress
from dtrain.resume import CHECKPOINTS, find, refuse_changes
from dtrain.segments import Segment
from dtrain.syncs.sync import Entry, Sync
from dtrain.tables import Table
from dtrain.totals import Totals
from dtrain.trace import FILE, Trace

PATIENCE_S = 2.0
"""How long a rank that fails after another one waits before it speaks, too."""


def train(run: Run, comm: Comm, out: Path, resume: str = "auto") -> dict[str, Any]:
    """Train `run` on the ranks of `comm`, into the folder `out`; return the summary.

    Collective. `resume` is "auto" (go on where `out` holds a checkpoint), "never" (`out` must be
    empty), or the folder of another run to go on from.

    Raises
    ------
    Refusal
        On all ranks alike before training begins. Later (a loss that is not finite, code 4) on
        the rank that found it: then the caller has to end the others.
    """
    number = threads(run, comm)
    token: folder.Owner | None = None
    progress: Progress | None = None
    try:
        found, table, done = _find(comm, out, resume)
        agreed = together(comm, lambda: plan(run.going_on(table), comm.size))
        alike(agreed, comm)
        together(
            comm, lambda: refuse_changes(out, table, agreed.run, done >= agreed.calendar.total)
        )
        token, attempt = _take(comm, out, resume, found)
        together(comm, lambda: folder.seen(out, comm.hosts[comm.rank]))
        comm.flight.settle(out / FLIGHT)
        job = build(agreed, comm)
        totals, afresh = _restore(job, found)
        totals.attempt = attempt
        progress = Progress(agreed, comm, out, totals)
        _publish(agreed, comm, totals, out)
        if agreed.run.top.trace:
            kind, routes = agreed.layout.schedule, agreed.layout.routes
            job.engine.trace = Trace(comm, job.seat, kind, routes, out / FILE, totals.wall_s)
        progress.hello(number, afresh)
        for segment in agreed.calendar.segments(totals.update):
            _learn(job, segment, totals, progress)
            _close(job, segment, totals, progress, out)
        summary = _finish(job, totals, out)
        progress.goodbye(summary)
        return summary
    except BaseException as error:
        _fail(error, comm, out, token)
        raise
    finally:
        comm.flight.leave()
        if progress is not None:
            progress.stop()
        if token is not None and comm.rank == 0:
            folder.release(out, token)


def _find(comm: Comm, out: Path, resume: str) -> tuple[str | None, Table | None, int]:
    """Return path, run table and updates of the checkpoint to go on from. Collective."""

    def first() -> tuple[str, Table, int] | None:
        manifest = None if comm.rank else find(out, resume)
        if manifest is None:
            return None
        return str(manifest.folder), manifest.table, int(manifest.state["update"])

    told = comm.exchange(together(comm, first))[0]
    return (None, None, 0) if told is None else (told[0], told[1], told[2])


def _take(comm: Comm, out: Path, resume: str, found: str | None) -> tuple[folder.Owner, int]:
    """Take the run folder; return its token and the number of this attempt. Collective."""

    def first() -> tuple[folder.Owner, int] | None:
        if comm.rank:
            return None
        token = folder.take(out)
        try:
            newest = find(out, resume)
            if (None if newest is None else str(newest.folder)) != found:
                raise Refusal(f"another run has just written into {out}: start this one again")
        except Refusal:
            folder.release(out, token)
            raise
        before = (folder.summary(out) or {}).get("attempts", 0)
        folder.shelve(out, FLIGHT, before)
        return token, 1 + before

    token, attempt = comm.exchange(together(comm, first))[0]
    return token, attempt


def _restore(job: Job, found: str | None) -> tuple[Totals, int]:
    """Put every part where the checkpoint left it. Collective.

    Returns what was done so far, and of how many replicas that trained apart the mean was taken
    to start from: 0 where all go on as they were.
    """
    if found is None:
        return Totals(), 0
    engine, path = job.engine, Path(found)

    def work() -> tuple[Totals, int]:
        manifest = checkpoint.read(path)
        same = checkpoint.restore(manifest, engine.blocks, engine.syncs, job.seat.replica)
        return Totals.read(manifest.state), 0 if same else manifest.replicas

    return together(job.lines.control, work)


def _publish(agreed: Plan, comm: Comm, totals: Totals, out: Path) -> None:
    """Write what is known before training, once every rank has accepted the run."""
    if comm.rank:
        return
    (out / "run.toml").write_text(resolved(agreed.run), encoding="utf-8")
    (out / "plan.txt").write_text(report.plan_text(agreed), encoding="utf-8")
    folder.summarise(out, report.summary(agreed, totals, "running"))


def _fail(error: BaseException, comm: Comm, out: Path, token: folder.Owner | None) -> None:
    """Note how the run ended, and let one of several ranks that fail speak first.

    The first that speaks ends the job, so the others hold their tongue for a while. A rank that is
    stopped has its record already: that was written where it stood, before its waits were left.
    """
    if isinstance(error, Refusal) and error.agreed:
        if token is not None and comm.rank == 0:
            folder.end(out, token, "failed", str(error))
        return
    stopped = isinstance(error, Stopped)
    if not stopped:
        sign(error, f"[{comm.flight.name}]")
        if comm.flight.folder is not None:
            comm.flight.dump(words(error), error)
    first = comm.rank == 0
    if token is not None:
        first = folder.end(out, token, "stopped" if stopped else "failed", words(error))
    comm.flight.leave()
    if isinstance(error, Stopped):
        error.quiet = not first
    if not first:
        try:
            time.sleep(PATIENCE_S)
        except Stopped as stop:  # the first one has spoken and ended the job
            stop.quiet = True
            raise


def _learn(job: Job, segment: Segment, totals: Totals, progress: Progress) -> None:
    """Train one segment and add up what all ranks tell of it. Collective."""
    agreed, engine, control = job.plan, job.engine, job.lines.control
    run = agreed.run
    sequence = order(agreed.data.train.size, run.top.seed, segment.epoch, run.data.shuffle)
    offsets = range(segment.offset, segment.offset + segment.last - segment.first)
    batches = [agreed.shares.batch(sequence, each, job.seat.replica) for each in offsets]
    traffic = control.traffic
    intra, inter = traffic.bytes_intra, traffic.bytes_inter
    for update in engine.run(job.train, batches, segment.first, segment.epoch):
        progress.show(update)
    if engine.trace is not None:
        last = segment.offset + len(offsets)
        engine.trace.close(agreed.shares.sizes(len(sequence), segment.offset, last))
    for sync in engine.syncs.values():
        sync.settle()
    row = {
        "stage": job.seat.stage,
        **asdict(engine.tally),
        "bytes_intra_node": traffic.bytes_intra - intra,
        "bytes_inter_node": traffic.bytes_inter - inter,
        "peak_live": engine.peak_live,
        "peak_bytes": engine.peak_bytes(),
        "rss_bytes": _rss_bytes(),
        "weights": {} if job.seat.replica else _entries(engine.syncs.values()),
    }
    totals.add(control.exchange(row), segment, len(engine.tasks), agreed.layout.mesh.stages)
    if segment.ends_epoch:
        for sync in engine.syncs.values():
            sync.end_epoch(totals.train_loss or 0.0)


def _close(job: Job, segment: Segment, totals: Totals, progress: Progress, out: Path) -> None:
    """Evaluate and checkpoint where they are due, and tell what happened. Collective."""
    control = job.lines.control
    evaluates, saves = _due(job.plan, segment)
    eval_s = save_s = None
    if evaluates or saves:
        shown = views(job)
        if evaluates:
            began = time.perf_counter()
            _test(job, shown, totals)
            eval_s = time.perf_counter() - began
        totals.tick()
        if saves:
            began = time.perf_counter()
            _save(job, shown, totals, out)
            save_s = time.perf_counter() - began
    progress.close(segment, eval_s, save_s)
    if control.rank == 0:
        folder.summarise(out, report.summary(job.plan, totals, "running"))


def _save(job: Job, shown: Views, totals: Totals, out: Path) -> None:
    """Write a checkpoint of what is shown, and of what this rank owns. Collective."""
    run, replica = job.plan.run, job.seat.replica
    held = checkpoint.tensors(job.engine.blocks, job.engine.syncs, shown, replica)
    name, state = f"replica-{replica}-stage-{job.seat.stage}", totals.state()
    where, keep = out / CHECKPOINTS, run.checkpoint.keep
    checkpoint.save(where, name, held, run.table(), state, job.lines.control, keep)


def _due(agreed: Plan, segment: Segment) -> tuple[bool, bool]:
    """Return whether a segment's end is due for an evaluation, and for a checkpoint."""
    run, end = agreed.run, segment.offset + segment.last - segment.first
    interval = run.checkpoint.every
    passed = interval > 0 and end // interval > segment.offset // interval
    turn = segment.ends_epoch and (segment.epoch + 1) % run.evaluate.every == 0
    return turn or segment.ends_run, passed or segment.ends_epoch or segment.ends_run


def _test(job: Job, shown: Views, totals: Totals) -> None:
    """Examine what is shown, into the totals. Collective; not counted as traffic."""
    totals.test = grade(job, shown, job.test, job.plan.shares)
    totals.tested = totals.update


def _finish(job: Job, totals: Totals, out: Path) -> dict[str, Any]:
    """Write the summary, with the digest of the model, and return it. Collective."""
    control, shown = job.lines.control, views(job)
    if totals.tested != totals.update:  # the length asked for was reached, but not tested there
        _test(job, shown, totals)
    own = [] if job.seat.replica else [_line(*pair) for v in shown.values() for pair in v.items()]
    pairs = sorted((name.encode(), line) for rank in control.exchange(own) for name, line in rank)
    digest = hashlib.sha256("".join(line for _, line in pairs).encode()).hexdigest()
    totals.tick()
    summary = report.summary(job.plan, totals, "finished", digest)
    if control.rank == 0:
        folder.summarise(out, summary)
    return summary


def _line(name: str, tensor: Tensor) -> tuple[str, str]:
    """Return a tensor's name and its line of the digest: name, dtype, shape, hash of its bytes."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    shape = ",".join(map(str, tensor.shape))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return name, f"{name} {dtype} ({shape}) {hashlib.sha256(flat.numpy().data).hexdigest()}\n"


def _entries(syncs: Iterable[Sync]) -> dict[str, Entry]:
    """Return what syncs know of weights that may be products."""
    return {name: entry for sync in syncs for name, entry in sync.entries().items()}


def _rss_bytes() -> int:
    """Return the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
