"""Train one run, from a checked run file to its summary.

Invariant: until the first segment all ranks raise an error or none does.
Afterwards the first rank that fails ends the job. Collective work is done at the ends of segments.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.build import (
    RankJob,
    build_rank,
    check_same_data,
    check_same_layout,
    set_threads,
)
from dtrain.checkpoint import run_folder, store
from dtrain.checkpoint.digest import model_digest
from dtrain.checkpoint.manifest import read_manifest
from dtrain.checkpoint.resume import (
    CHECKPOINT_FOLDER,
    ResumePoint,
    check_same_model,
    check_same_run,
    check_saved_data,
    find_checkpoint,
    find_resume_point,
)
from dtrain.comm.agree import all_or_none, broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data.dataset import Standardised
from dtrain.data.sampler import epoch_order
from dtrain.engine.trace import TRACE_FILE, Trace
from dtrain.errors import ConfigError, DtrainError, Interrupted, add_location, one_line
from dtrain.evaluation import EvalWeights, evaluate_weights, evaluation_weights
from dtrain.layer_notes import layer_notes
from dtrain.monitoring.progress import Progress
from dtrain.monitoring.run_totals import RunTotals
from dtrain.monitoring.summary import make_summary
from dtrain.planning import report
from dtrain.planning.plan import Plan, make_plan
from dtrain.schedules.segments import Segment
from dtrain.schema import Table

REPORT_DELAY_S = 2.0
"""Seconds by which a rank that fails after another one delays its report."""


def train(run: RunConfig, comm: Comm, out: Path, resume: str = "auto") -> dict[str, Any]:
    """Train `run` into the folder `out`; return the summary. Collective over `comm`.

    Parameters
    ----------
    resume : str
        "auto": resume from the newest checkpoint in `out`, if there is one. "never": `out` must be
        empty. Else the folder of another run to resume from.

    Raises
    ------
    DtrainError
        Before training begins on all ranks. Later (a loss that is not finite, for example) on the
        rank that found it: then the caller has to end the others.
    """
    threads = set_threads(run, comm)
    owner: run_folder.Owner | None = None
    progress: Progress | None = None
    try:
        point = find_resume_point(comm, out, resume)
        with_blocks = run.with_checkpoint_blocks(point.run_table)
        plan = all_or_none(comm, lambda: make_plan(with_blocks, comm.size))
        check_same_layout(plan, comm)
        data_fingerprint = check_same_data(plan, comm)
        is_trained = point.updates >= plan.training_length.total_updates
        all_or_none(comm, lambda: check_same_run(out, point.run_table, plan.run, is_trained))
        all_or_none(comm, lambda: check_saved_data(point.fingerprint, data_fingerprint))
        owner, attempt = broadcast_object(comm, lambda: _acquire_folder(out, resume, point))
        all_or_none(comm, lambda: run_folder.check_visible(out, comm.hosts[comm.rank]))
        comm.flight.set_folder(out / run_folder.FLIGHT_FOLDER)
        job = build_rank(plan, comm)
        fingerprint = {"model": job.model_fingerprint, "data": data_fingerprint}
        all_or_none(comm, lambda: check_same_model(point.fingerprint, job.model_fingerprint))
        totals, merged_replicas = _restore(job, point)
        totals.attempt = attempt
        progress = Progress(plan, comm, out, totals)
        if comm.rank == 0:
            _write_plan(plan, totals, out)
        if plan.run.settings.trace:
            job.engine.trace = _start_trace(job, comm, out, totals)
        copied_blocks = job.copied_blocks if point.checkpoint is None else []
        notes = layer_notes(plan, job.engine.blocks, job.train_loader, comm)
        progress.start(threads, merged_replicas, copied_blocks, notes)
        for segment in plan.training_length.segments(totals.update):
            _train_segment(job, segment, totals, progress)
            _finish_segment(job, segment, totals, progress, out, fingerprint)
        summary = _finish_run(job, totals, out)
        progress.finish(summary)
        return summary
    except BaseException as error:
        _report_failure(error, comm, out, owner)
        raise
    finally:
        comm.flight.close()
        if progress is not None:
            progress.stop()
        if owner is not None and comm.rank == 0:
            run_folder.release(out, owner)


def _acquire_folder(out: Path, resume: str, point: ResumePoint) -> tuple[run_folder.Owner, int]:
    """Lock the run folder; return its owner and the number of this attempt."""
    owner = run_folder.acquire(out)
    try:
        newest = ResumePoint.from_manifest(find_checkpoint(out, resume))
        if newest.checkpoint != point.checkpoint:
            raise ConfigError(
                "run-folder.changed",
                f"another run has just written into {out}: start this run again",
            )
    except DtrainError:
        run_folder.release(out, owner)
        raise
    attempts = (run_folder.read_summary(out) or {}).get("attempts", 0)
    run_folder.archive(out, run_folder.FLIGHT_FOLDER, attempts)
    return owner, attempts + 1


def _restore(job: RankJob, point: ResumePoint) -> tuple[RunTotals, int]:
    """Load the checkpoint into every part of this rank. Collective over all ranks.

    Returns
    -------
    RunTotals
        The counts so far.
    int
        The number of diverged replicas whose mean all replicas start from; 0: each replica
        continues with its own weights.
    """
    if point.checkpoint is None:
        return RunTotals(), 0
    engine, folder = job.engine, Path(point.checkpoint)

    def restore_rank() -> tuple[RunTotals, int]:
        manifest = read_manifest(folder)
        same = store.restore(manifest, engine.blocks, engine.syncs, job.position.replica)
        return RunTotals.from_state(manifest.state), 0 if same else manifest.replicas

    return all_or_none(job.groups.control, restore_rank)


def _write_plan(plan: Plan, totals: RunTotals, out: Path) -> None:
    """Write the resolved run, its plan and a first summary, once every rank accepted the run."""
    (out / "run.toml").write_text(plan.run.to_text(), encoding="utf-8")
    (out / "plan.txt").write_text(report.plan_text(plan), encoding="utf-8")
    run_folder.write_summary(out, make_summary(plan, totals, "running"))


def _start_trace(job: RankJob, comm: Comm, out: Path, totals: RunTotals) -> Trace:
    """Return the recorder of when this rank computes what. Collective over `comm`."""
    layout = job.plan.layout
    return Trace(
        comm, job.position, layout.schedule, layout.routes, out / TRACE_FILE, totals.wall_s
    )


def _train_segment(job: RankJob, segment: Segment, totals: RunTotals, progress: Progress) -> None:
    """Train one segment and add up the records of all ranks. Collective over all ranks."""
    plan, engine, control = job.plan, job.engine, job.groups.control
    order = epoch_order(
        plan.data.train.size, plan.run.settings.seed, segment.epoch, plan.run.data.shuffle
    )
    end = segment.offset + segment.stop - segment.start
    batches = [
        plan.batch_splitter.batch(order, offset, job.position.replica)
        for offset in range(segment.offset, end)
    ]
    traffic = control.traffic
    intra_before, inter_before = traffic.bytes_intra, traffic.bytes_inter
    for update in engine.run(job.train_loader, batches, segment.start, segment.epoch):
        progress.show(update)
    if engine.trace is not None:
        engine.trace.write_segment(
            plan.batch_splitter.count_micro_batches(len(order), segment.offset, end)
        )
    for sync in engine.syncs.values():
        sync.finish_pending()
    record = {
        "stage": job.position.stage,
        **asdict(engine.metric_sums),
        "bytes_intra_node": traffic.bytes_intra - intra_before,
        "bytes_inter_node": traffic.bytes_inter - inter_before,
        "peak_live": engine.peak_live,
        "peak_bytes": engine.peak_bytes(),
        "rss_bytes": _rss_bytes(),
        "weights": _low_rank_stats(job),
    }
    totals.add_segment(
        control.allgather_object(record), segment, len(engine.block_specs), plan.layout.mesh.stages
    )
    if segment.ends_epoch:
        for sync in engine.syncs.values():
            sync.end_epoch(totals.train_loss or 0.0)


def _finish_segment(
    job: RankJob,
    segment: Segment,
    totals: RunTotals,
    progress: Progress,
    out: Path,
    fingerprint: Table,
) -> None:
    """Evaluate and save if configured at this point, and report. Collective over all ranks."""
    eval_s = save_s = None
    evaluates, saves = _due_work(job.plan, segment)
    if evaluates or saves:
        eval_weights = evaluation_weights(job)
        if evaluates:
            start = time.perf_counter()
            _evaluate(job, eval_weights, totals)
            eval_s = time.perf_counter() - start
        totals.tick()
        if saves:
            start = time.perf_counter()
            _save_checkpoint(job, eval_weights, totals, out, fingerprint)
            save_s = time.perf_counter() - start
    progress.end_segment(segment, eval_s, save_s)
    if job.groups.control.rank == 0:
        run_folder.write_summary(out, make_summary(job.plan, totals, "running"))


def _due_work(plan: Plan, segment: Segment) -> tuple[bool, bool]:
    """Return whether to evaluate, and whether to save a checkpoint, at a segment's end."""
    run, end = plan.run, segment.offset + segment.stop - segment.start
    interval = run.checkpoint.every
    evaluates = segment.ends_epoch and (segment.epoch + 1) % run.evaluate.every == 0
    saves = interval > 0 and end // interval > segment.offset // interval
    return evaluates or segment.ends_run, saves or segment.ends_epoch or segment.ends_run


def _evaluate(job: RankJob, eval_weights: EvalWeights, totals: RunTotals) -> None:
    """Test the evaluation weights, into the totals. Collective over all ranks."""
    totals.test = evaluate_weights(job, eval_weights, job.test_loader, job.plan.batch_splitter)
    totals.tested = totals.update


def _save_checkpoint(
    job: RankJob, eval_weights: EvalWeights, totals: RunTotals, out: Path, fingerprint: Table
) -> None:
    """Write a checkpoint. Collective over all ranks."""
    run, engine, position = job.plan.run, job.engine, job.position
    tensors = store.collect_tensors(engine.blocks, engine.syncs, eval_weights, position.replica)
    train_split = job.plan.data.train
    if position.replica == position.stage == 0 and isinstance(train_split, Standardised):
        statistics = train_split.statistics()
        tensors |= {f"statistics/{name}": tensor for name, tensor in statistics.items()}
    store.save(
        out / CHECKPOINT_FOLDER,
        f"replica-{position.replica}-stage-{position.stage}",
        tensors,
        run.to_table(),
        totals.state() | {"tied_names": dict(job.plan.layout.model.tied_names)},
        job.groups.control,
        run.checkpoint.keep,
        fingerprint,
    )


def _finish_run(job: RankJob, totals: RunTotals, out: Path) -> dict[str, Any]:
    """Write the summary, with the model's digest, and return it. Collective over all ranks."""
    control, eval_weights = job.groups.control, evaluation_weights(job)
    if totals.tested != totals.update:  # resumed at its end, from a checkpoint without a test
        _evaluate(job, eval_weights, totals)
    own_tensors = {
        name: tensor
        for tensors in (() if job.position.replica else eval_weights.values())
        for name, tensor in tensors.items()
    }
    digest = model_digest(own_tensors, control)
    totals.tick()
    summary = make_summary(job.plan, totals, "finished", digest)
    if control.rank == 0:
        run_folder.write_summary(out, summary)
    return summary


def _report_failure(
    error: BaseException, comm: Comm, out: Path, owner: run_folder.Owner | None
) -> None:
    """Record how the run ended, and delay the report of all ranks that fail but the first.

    The first report ends the job, so only that one is printed. A rank that a signal stops has
    written its flight record already, before its waits ended.
    """
    if isinstance(error, DtrainError) and error.on_all_ranks:
        if owner is not None and comm.rank == 0:
            run_folder.release_unfinished(out, owner, "failed", str(error), error.key)
        return
    is_stopped = isinstance(error, Interrupted)
    if not is_stopped:
        add_location(error, f"[{comm.flight.name}]")
        if comm.flight.folder is not None:
            comm.flight.dump(one_line(error), error)
    is_first = comm.rank == 0
    if owner is not None:
        status = "stopped" if is_stopped else "failed"
        key = error.key if isinstance(error, (DtrainError, Interrupted)) else None
        is_first = run_folder.release_unfinished(out, owner, status, one_line(error), key)
    comm.flight.close()
    if isinstance(error, Interrupted):
        error.quiet = not is_first
    if not is_first:
        try:
            time.sleep(REPORT_DELAY_S)
        except Interrupted as signal:  # the first report has ended the job
            signal.quiet = True
            raise


def _low_rank_stats(job: RankJob) -> dict[str, Any]:
    """Return rank and traffic of the weights that may be products; replica 0 reports for all."""
    syncs = () if job.position.replica else job.engine.syncs.values()
    return {name: stats for sync in syncs for name, stats in sync.low_rank_stats().items()}


def _rss_bytes() -> int:
    """Return the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
