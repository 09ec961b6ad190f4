"""`train()`: one run, from a checked run file to its summary, from top to bottom.

Invariant: until the first segment every refusal is agreed upon, so all ranks refuse or none; from
then on the first rank that fails ends the job. Everything collective happens at a segment's end.
"""

from __future__ import annotations

import hashlib
import resource
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain import checkpoint, folder, report
from dtrain.checkpoint import Manifest
from dtrain.comm.comm import Comm
from dtrain.config import Run
from dtrain.data import order, parts
from dtrain.job import Job, Plan, build, plan, threads, together
from dtrain.progress import Progress
from dtrain.resume import CHECKPOINTS, find, refuse_changes
from dtrain.segments import Segment
from dtrain.tables import dump
from dtrain.totals import Totals, tested


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
    agreed = together(comm, lambda: plan(run, comm.size))
    manifest = _enter(agreed, comm, out, resume)
    try:
        together(comm, lambda: _publish(agreed, comm, out))
        job = build(agreed, comm)
        totals = _restore(job, manifest)
        progress = Progress(agreed, comm, out, totals)
        progress.hello(number)
        for segment in agreed.calendar.segments(totals.update):
            _learn(job, segment, totals, progress)
            _close(job, segment, totals, progress, out)
        summary = _finish(job, totals, out)
        progress.goodbye(summary)
        return summary
    except BaseException as error:
        folder.fail(out, f"{type(error).__name__}: {error}")
        raise
    finally:
        if comm.rank == 0:
            folder.release(out)


def _enter(agreed: Plan, comm: Comm, out: Path, resume: str) -> Manifest | None:
    """Take the run folder and return the checkpoint to go on from. Collective."""

    def first() -> str | None:
        if comm.rank:
            return None
        manifest = find(out, resume)
        if manifest is not None:
            refuse_changes(manifest, agreed.run.table())
        folder.take(out)
        return None if manifest is None else str(manifest.folder)

    found = comm.exchange(together(comm, first))[0]
    return None if found is None else checkpoint.read(Path(found))


def _publish(agreed: Plan, comm: Comm, out: Path) -> None:
    """Write what is known before training: the resolved run, the plan, that it is running."""
    if comm.rank:
        return
    (out / "run.toml").write_text(dump(agreed.run.table()), encoding="utf-8")
    (out / "plan.txt").write_text(report.plan_text(agreed), encoding="utf-8")
    known = {"status": "running", "ranks": comm.size, "replicas": agreed.layout.mesh.replicas}
    folder.summarise(out, known | {"stages": agreed.layout.mesh.stages})


def _restore(job: Job, manifest: Manifest | None) -> Totals:
    """Put every part where the checkpoint left it; return what was done so far. Collective."""
    if manifest is None:
        return Totals()
    engine = job.engine
    together(
        job.lines.control,
        lambda: checkpoint.restore(manifest, engine.blocks, engine.syncs, job.seat.replica),
    )
    return Totals.read(manifest.state)


def _learn(job: Job, segment: Segment, totals: Totals, progress: Progress) -> None:
    """Train one segment and add up what all ranks tell of it. Collective."""
    agreed, engine, control = job.plan, job.engine, job.lines.control
    source, run = agreed.data.train, agreed.run
    sequence = order(source.size, run.top.seed, segment.epoch, run.data.shuffle)
    offsets = range(segment.offset, segment.offset + segment.last - segment.first)
    batches = [agreed.shares.batch(sequence, each, job.seat.replica) for each in offsets]
    traffic = control.traffic
    intra, inter = traffic.bytes_intra, traffic.bytes_inter
    for update in engine.run(source, batches, segment.first, segment.epoch):
        progress.show(update)
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
    }
    layout = agreed.layout
    totals.add(control.exchange(row), segment, len(layout.parts), layout.mesh.stages)
    if segment.ends_epoch:
        for sync in engine.syncs.values():
            sync.end_epoch(totals.train_loss or 0.0)


def _close(job: Job, segment: Segment, totals: Totals, progress: Progress, out: Path) -> None:
    """Evaluate and checkpoint where they are due, and record what happened. Collective."""
    run, control = job.plan.run, job.lines.control
    evaluates, saves = _due(job.plan, segment)
    with control.uncounted(), ExitStack() as stack:
        views = {index: sync.view() for index, sync in job.engine.syncs.items()}
        if evaluates:
            for index, block in job.engine.blocks.items():
                stack.enter_context(block.showing(views[index]))
            totals.test = _evaluate(job)
            stack.close()
        totals.tick()
        if saves:
            held = checkpoint.tensors(job.engine.blocks, job.engine.syncs, views, job.seat.replica)
            name = f"replica-{job.seat.replica}-stage-{job.seat.stage}"
            where, table = out / CHECKPOINTS, run.table()
            checkpoint.save(where, name, held, table, totals.state(), control, run.checkpoint.keep)
    progress.close(segment, evaluates, saves)


def _due(agreed: Plan, segment: Segment) -> tuple[bool, bool]:
    """Return whether a segment's end is due for an evaluation, and for a checkpoint."""
    run, end = agreed.run, segment.offset + segment.last - segment.first
    interval = run.checkpoint.every
    passed = interval > 0 and end // interval > segment.offset // interval
    turn = segment.ends_epoch and (segment.epoch + 1) % run.evaluate.every == 0
    return turn or segment.ends_run, passed or segment.ends_epoch or segment.ends_run


def _evaluate(job: Job) -> dict[str, Any]:
    """Return the evaluation of the model that the blocks show now. Collective."""
    agreed, layout = job.plan, job.plan.layout
    source, rows = agreed.data.test, agreed.run.top.batch_size
    own = parts(source.size, layout.mesh.replicas)[job.seat.replica]
    starts = range(own.start, own.stop, rows)
    micros = [np.arange(start, min(start + rows, own.stop)) for start in starts]
    tally = job.engine.predict(source, micros)
    told = job.lines.control.exchange({"stage": job.seat.stage, **asdict(tally)})
    return tested(told, len(layout.parts))


def _finish(job: Job, totals: Totals, out: Path) -> dict[str, Any]:
    """Write the summary, with the digest of the model, and return it. Collective."""
    control = job.lines.control
    with control.uncounted():
        views = [sync.view() for sync in job.engine.syncs.values()]
    own = [] if job.seat.replica else [_line(*pair) for view in views for pair in view.items()]
    lines = sorted((line for rank in control.exchange(own) for line in rank), key=_name)
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    totals.tick()
    summary = report.summary(job.plan, totals, digest)
    if control.rank == 0:
        folder.summarise(out, summary)
    return summary


def _line(name: str, tensor: Tensor) -> str:
    """Return a tensor's line of the digest: name, dtype, shape and hash of its bytes."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    shape = ",".join(map(str, tensor.shape))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {dtype} ({shape}) {hashlib.sha256(flat.numpy().data).hexdigest()}\n"


def _name(line: str) -> bytes:
    return line.partition(" ")[0].encode()


def _rss_bytes() -> int:
    """Return the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
