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

from dtrain.build import RankJob, build_rank, check_same_data, set_threads
from dtrain.checkpoint import run_folder as folder
from dtrain.checkpoint import store as checkpoint
from dtrain.checkpoint.manifest import read_manifest
from dtrain.checkpoint.resume import CHECKPOINT_FOLDER, check_same_run, find_checkpoint
from dtrain.checkpoint.run_folder import FLIGHT_FOLDER
from dtrain.comm.agree import all_or_none
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data.sampler import epoch_order
from dtrain.engine.trace import TRACE_FILE, Trace
from dtrain.errors import ConfigError, DtrainError, Interrupted, add_location, one_line
from dtrain.evaluate import EvalWeights, evaluate_weights, evaluation_weights, run_file_text
from dtrain.monitoring.progress import Progress
from dtrain.monitoring.run_totals import RunTotals
from dtrain.monitoring.summary import make_summary as summary_of
from dtrain.planning import report
from dtrain.planning.plan import Plan, make_plan
from dtrain.schedules.segments import Segment
from dtrain.schema import Table
from dtrain.syncs.base import LowRankStats, Sync

REPORT_DELAY_S = 2.0
"""How long a rank that fails after another one waits before it speaks, too."""


def train(run: RunConfig, comm: Comm, out: Path, resume: str = "auto") -> dict[str, Any]:
    """Train `run` on the ranks of `comm`, into the folder `out`; return the summary.

    Collective. `resume` is "auto" (go on where `out` holds a checkpoint), "never" (`out` must be
    empty), or the folder of another run to go on from.

    Raises
    ------
    DtrainError
        On all ranks alike before training begins. Later (a loss that is not finite, code 4) on
        the rank that found it: then the caller has to end the others.
    """
    number = set_threads(run, comm)
    token: folder.Owner | None = None
    progress: Progress | None = None
    try:
        found, table, done = _find_checkpoint(comm, out, resume)
        agreed = all_or_none(comm, lambda: make_plan(run.with_checkpoint_blocks(table), comm.size))
        check_same_data(agreed, comm)
        all_or_none(
            comm,
            lambda: check_same_run(
                out, table, agreed.run, done >= agreed.training_length.total_updates
            ),
        )
        token, attempt = _acquire_folder(comm, out, resume, found)
        all_or_none(comm, lambda: folder.check_visible(out, comm.hosts[comm.rank]))
        comm.flight.set_folder(out / FLIGHT_FOLDER)
        job = build_rank(agreed, comm)
        totals, afresh = _restore(job, found)
        totals.attempt = attempt
        progress = Progress(agreed, comm, out, totals)
        _publish(agreed, comm, totals, out)
        if agreed.run.settings.trace:
            kind, routes = agreed.layout.schedule, agreed.layout.routes
            job.engine.trace = Trace(
                comm, job.position, kind, routes, out / TRACE_FILE, totals.wall_s
            )
        progress.start(number, afresh)
        for segment in agreed.training_length.segments(totals.update):
            _train_segment(job, segment, totals, progress)
            _finish_segment(job, segment, totals, progress, out)
        summary = _finish_run(job, totals, out)
        progress.finish(summary)
        return summary
    except BaseException as error:
        _report_failure(error, comm, out, token)
        raise
    finally:
        comm.flight.close()
        if progress is not None:
            progress.stop()
        if token is not None and comm.rank == 0:
            folder.release(out, token)


def _find_checkpoint(comm: Comm, out: Path, resume: str) -> tuple[str | None, Table | None, int]:
    """Return path, run table and updates of the checkpoint to go on from. Collective."""

    def first() -> tuple[str, Table, int] | None:
        manifest = None if comm.rank else find_checkpoint(out, resume)
        if manifest is None:
            return None
        return str(manifest.folder), manifest.run_table, int(manifest.state["update"])

    told = comm.allgather_object(all_or_none(comm, first))[0]
    return (None, None, 0) if told is None else (told[0], told[1], told[2])


def _acquire_folder(
    comm: Comm, out: Path, resume: str, checkpoint_path: str | None
) -> tuple[folder.Owner, int]:
    """Take the run folder; return its token and the number of this attempt. Collective."""

    def first() -> tuple[folder.Owner, int] | None:
        if comm.rank:
            return None
        token = folder.acquire(out)
        try:
            newest = find_checkpoint(out, resume)
            if (None if newest is None else str(newest.folder)) != checkpoint_path:
                raise ConfigError(
                    "todo.key", f"another run has just written into {out}: start this one again"
                )
        except DtrainError:
            folder.release(out, token)
            raise
        before = (folder.read_summary(out) or {}).get("attempts", 0)
        folder.archive(out, FLIGHT_FOLDER, before)
        return token, 1 + before

    token, attempt = comm.allgather_object(all_or_none(comm, first))[0]
    return token, attempt


def _restore(job: RankJob, checkpoint_path: str | None) -> tuple[RunTotals, int]:
    """Put every part where the checkpoint left it. Collective.

    Returns what was done so far, and of how many replicas that trained apart the mean was taken
    to start from: 0 where all go on as they were.
    """
    if checkpoint_path is None:
        return RunTotals(), 0
    engine, path = job.engine, Path(checkpoint_path)

    def work() -> tuple[RunTotals, int]:
        manifest = read_manifest(path)
        same = checkpoint.restore(manifest, engine.blocks, engine.syncs, job.position.replica)
        return RunTotals.from_state(manifest.state), 0 if same else manifest.replicas

    return all_or_none(job.groups.control, work)


def _publish(plan: Plan, comm: Comm, totals: RunTotals, out: Path) -> None:
    """Write what is known before training, once every rank has accepted the run."""
    if comm.rank:
        return
    (out / "run.toml").write_text(run_file_text(plan.run), encoding="utf-8")
    (out / "plan.txt").write_text(report.plan_text(plan), encoding="utf-8")
    folder.write_summary(out, summary_of(plan, totals, "running"))


def _report_failure(
    error: BaseException, comm: Comm, out: Path, token: folder.Owner | None
) -> None:
    """Note how the run ended, and let one of several ranks that fail speak first.

    The first that speaks ends the job, so the others hold their tongue for a while. A rank that is
    stopped has its record already: that was written where it stood, before its waits were left.
    """
    if isinstance(error, DtrainError) and error.agreed:
        if token is not None and comm.rank == 0:
            folder.release_unfinished(out, token, "failed", str(error))
        return
    stopped = isinstance(error, Interrupted)
    if not stopped:
        add_location(error, f"[{comm.flight.name}]")
        if comm.flight.folder is not None:
            comm.flight.dump(one_line(error), error)
    first = comm.rank == 0
    if token is not None:
        first = folder.release_unfinished(
            out, token, "stopped" if stopped else "failed", one_line(error)
        )
    comm.flight.close()
    if isinstance(error, Interrupted):
        error.quiet = not first
    if not first:
        try:
            time.sleep(REPORT_DELAY_S)
        except Interrupted as stop:  # the first one has spoken and ended the job
            stop.quiet = True
            raise


def _train_segment(job: RankJob, segment: Segment, totals: RunTotals, progress: Progress) -> None:
    """Train one segment and add up what all ranks tell of it. Collective."""
    agreed, engine, control = job.plan, job.engine, job.groups.control
    run = agreed.run
    sequence = epoch_order(
        agreed.data.train.size, run.settings.seed, segment.epoch, run.data.shuffle
    )
    offsets = range(segment.offset, segment.offset + segment.stop - segment.start)
    batches = [
        agreed.batch_splitter.batch(sequence, each, job.position.replica) for each in offsets
    ]
    traffic = control.traffic
    intra, inter = traffic.bytes_intra, traffic.bytes_inter
    for update in engine.run(job.train_loader, batches, segment.start, segment.epoch):
        progress.show(update)
    if engine.trace is not None:
        last = segment.offset + len(offsets)
        engine.trace.write_segment(
            agreed.batch_splitter.count_micro_batches(len(sequence), segment.offset, last)
        )
    for sync in engine.syncs.values():
        sync.finish_pending()
    row = {
        "stage": job.position.stage,
        **asdict(engine.metric_sums),
        "bytes_intra_node": traffic.bytes_intra - intra,
        "bytes_inter_node": traffic.bytes_inter - inter,
        "peak_live": engine.peak_live,
        "peak_bytes": engine.peak_bytes(),
        "rss_bytes": _rss_bytes(),
        "weights": {} if job.position.replica else _low_rank_stats(engine.syncs.values()),
    }
    totals.add_segment(
        control.allgather_object(row), segment, len(engine.block_specs), agreed.layout.mesh.stages
    )
    if segment.ends_epoch:
        for sync in engine.syncs.values():
            sync.end_epoch(totals.train_loss or 0.0)


def _finish_segment(
    job: RankJob, segment: Segment, totals: RunTotals, progress: Progress, out: Path
) -> None:
    """Evaluate and checkpoint where they are due, and tell what happened. Collective."""
    control = job.groups.control
    evaluates, saves = _due_work(job.plan, segment)
    eval_s = save_s = None
    if evaluates or saves:
        shown = evaluation_weights(job)
        if evaluates:
            began = time.perf_counter()
            _evaluate(job, shown, totals)
            eval_s = time.perf_counter() - began
        totals.tick()
        if saves:
            began = time.perf_counter()
            _save_checkpoint(job, shown, totals, out)
            save_s = time.perf_counter() - began
    progress.end_segment(segment, eval_s, save_s)
    if control.rank == 0:
        folder.write_summary(out, summary_of(job.plan, totals, "running"))


def _save_checkpoint(job: RankJob, eval_weights: EvalWeights, totals: RunTotals, out: Path) -> None:
    """Write a checkpoint of what is shown, and of what this rank owns. Collective."""
    run, replica = job.plan.run, job.position.replica
    held = checkpoint.collect_tensors(job.engine.blocks, job.engine.syncs, eval_weights, replica)
    name, state = f"replica-{replica}-stage-{job.position.stage}", totals.state()
    where, keep = out / CHECKPOINT_FOLDER, run.checkpoint.keep
    checkpoint.save(where, name, held, run.to_table(), state, job.groups.control, keep)


def _due_work(plan: Plan, segment: Segment) -> tuple[bool, bool]:
    """Return whether a segment's end is due for an evaluation, and for a checkpoint."""
    run, end = plan.run, segment.offset + segment.stop - segment.start
    interval = run.checkpoint.every
    passed = interval > 0 and end // interval > segment.offset // interval
    turn = segment.ends_epoch and (segment.epoch + 1) % run.evaluate.every == 0
    return turn or segment.ends_run, passed or segment.ends_epoch or segment.ends_run


def _evaluate(job: RankJob, eval_weights: EvalWeights, totals: RunTotals) -> None:
    """Examine what is shown, into the totals. Collective; not counted as traffic."""
    totals.test = evaluate_weights(job, eval_weights, job.test_loader, job.plan.batch_splitter)
    totals.tested = totals.update


def _finish_run(job: RankJob, totals: RunTotals, out: Path) -> dict[str, Any]:
    """Write the summary, with the digest of the model, and return it. Collective."""
    control, shown = job.groups.control, evaluation_weights(job)
    if totals.tested != totals.update:  # the length asked for was reached, but not tested there
        _evaluate(job, shown, totals)
    own = (
        []
        if job.position.replica
        else [_digest_line(*pair) for v in shown.values() for pair in v.items()]
    )
    pairs = sorted(
        (name.encode(), line) for rank in control.allgather_object(own) for name, line in rank
    )
    digest = hashlib.sha256("".join(line for _, line in pairs).encode()).hexdigest()
    totals.tick()
    summary = summary_of(job.plan, totals, "finished", digest)
    if control.rank == 0:
        folder.write_summary(out, summary)
    return summary


def _digest_line(name: str, tensor: Tensor) -> tuple[str, str]:
    """Return a tensor's name and its line of the digest: name, dtype, shape, hash of its bytes."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    shape = ",".join(map(str, tensor.shape))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return name, f"{name} {dtype} ({shape}) {hashlib.sha256(flat.numpy().data).hexdigest()}\n"


def _low_rank_stats(syncs: Iterable[Sync]) -> dict[str, LowRankStats]:
    """Return what syncs know of weights that may be products."""
    return {name: entry for sync in syncs for name, entry in sync.low_rank_stats().items()}


def _rss_bytes() -> int:
    """Return the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
