"""The start of a session: check the run on all ranks, build this rank, restore the checkpoint.

Invariant: all ranks raise an error or none does. Whatever is opened is entered into an `ExitStack`
at once, so a start that fails leaves nothing open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dtrain.build import RankJob, build_rank, check_same_layout, make_plan_together, set_threads
from dtrain.callbacks import Callback, Ema, all_callbacks, with_callback_keys
from dtrain.checkpoint import run_folder
from dtrain.checkpoint.local_level import recover
from dtrain.checkpoint.resume import ResumePoint, damage_notes, find_resume_point
from dtrain.checkpoint.same_run import data_path_notes
from dtrain.checkpoint.saved_fingerprint import check_same_model, source_hashes, source_notes
from dtrain.comm.agree import all_or_none
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.monitoring.machine_peak import measured_peak
from dtrain.monitoring.monitor import Monitor
from dtrain.monitoring.run_totals import RunTotals
from dtrain.monitoring.start_log import StartLog
from dtrain.planning.placement_warnings import placement_warnings
from dtrain.planning.plan import Plan
from dtrain.schema import Table
from dtrain.session.folder_lock import FolderLock
from dtrain.session.hang_watch import HangWatch
from dtrain.session.job_limit import JobLimit
from dtrain.session.layer_notes import layer_notes
from dtrain.session.measured_cuts import settle_cuts
from dtrain.session.same_program import check_same_program, check_same_source
from dtrain.session.start import (
    check_metrics,
    check_resume,
    check_weights_stay,
    make_recorder,
    observed_limit,
    read_data,
    restore_run,
    resume_folders,
    share_module,
    start_trace,
    write_plan,
)


@dataclass(frozen=True)
class OpenRun:
    """A run that is open on this rank.

    Parameters
    ----------
    out : Path
        The run folder.
    job : RankJob
        The plan, the engine and the groups of this rank.
    callbacks : tuple of callable
        Those of the run's keys, and the given ones.
    ema : Ema or None
        The averaged weights.
    totals : RunTotals
        The counts over all attempts.
    monitor : Monitor
        The screen and the records.
    fingerprint : dict
        What identifies model, data and code in a later start.
    restored_update : int
        Updates that the restored checkpoint holds.
    limit : JobLimit or None
        The end of the job, on rank 0.
    peak_flops : float or None
        Measured peak of the machine, in operations per second.
    show_start : callable
        Prints the head of the run and its notes. Collective over all ranks.
    """

    out: Path
    job: RankJob
    callbacks: tuple[Callback, ...]
    ema: Ema | None
    totals: RunTotals
    monitor: Monitor
    fingerprint: Table
    restored_update: int
    limit: JobLimit | None
    peak_flops: float | None
    show_start: Callable[[], None]


@dataclass(frozen=True)
class CheckedRun:
    """A run that all ranks have checked, before the folder is locked."""

    plan: Plan
    point: ResumePoint
    callbacks: tuple[Callback, ...]
    data_fingerprint: Table
    notes: list[str]
    threads: int


def open_run(
    given: RunConfig,
    out: Path,
    resume: str,
    callbacks: Sequence[Callback],
    comm: Comm,
    lock: FolderLock,
    watch: HangWatch,
    resources: ExitStack,
) -> OpenRun:
    """Lock the folder, build this rank and restore the newest checkpoint. Collective over `comm`.

    `lock` is that of the run folder `out`, `watch` that of this rank; `resources` receives what has
    to be closed, even by a start that fails. `resume` is that of `Session`.

    Raises
    ------
    DtrainError
        On all ranks.
    """
    log = StartLog(comm)
    resources.callback(comm.flight.close)
    checked = _check_run(given, out, resume, callbacks, comm, log)
    run, point = checked.plan.run, checked.point
    recorder = all_or_none(comm, lambda: make_recorder(run, comm))
    limit = all_or_none(comm, lambda: observed_limit(run, comm))
    if limit is not None:
        resources.callback(limit.close)
    resources.callback(lock.release)
    attempt = lock.acquire(resume, point)
    comm.flight.set_folder(out / run_folder.FLIGHT_FOLDER)
    watch.use_run_folder(checked.plan.layout.mesh)
    with log.step("building the blocks"):
        job = _build(checked.plan, comm, resources)
    all_or_none(comm, lambda: check_same_model(point.fingerprint, job.model_fingerprint))
    ema = _attach_ema(checked.callbacks, job)
    totals, merged_replicas = restore_run(job, point, checked.callbacks, ema)
    totals.attempt = attempt
    peak_flops = measured_peak(job.engine.engine_spec.device, job.plan.layout.dtype)
    monitor = Monitor(job.plan, comm, out, totals, recorder)
    resources.callback(monitor.stop)
    _start_records(job, totals, out, comm)
    fingerprint: Table = {
        "model": job.model_fingerprint,
        "data": checked.data_fingerprint,
        "source": source_hashes(run),
    }
    return OpenRun(
        out=out,
        job=job,
        callbacks=checked.callbacks,
        ema=ema,
        totals=totals,
        monitor=monitor,
        fingerprint=fingerprint,
        restored_update=point.updates,
        limit=limit,
        peak_flops=peak_flops,
        show_start=_start_message(checked, job, monitor, merged_replicas, fingerprint, comm, log),
    )


def _check_run(
    given: RunConfig,
    out: Path,
    resume: str,
    callbacks: Sequence[Callback],
    comm: Comm,
    log: StartLog,
) -> CheckedRun:
    """Plan the run, read its data, and refuse on all ranks what cannot be trained."""
    check_same_program(given, comm)
    share_module(given.model.target, comm)
    threads = set_threads(given, comm)
    level, keep = given.checkpoint.local, given.checkpoint.keep
    recovered = recover(comm, out, level, keep) if level is not None and resume == "auto" else []
    point = find_resume_point(comm, out, resume)
    run = all_or_none(comm, lambda: with_callback_keys(given, callbacks))
    run = settle_cuts(run.with_checkpoint_blocks(point.run_table), comm)
    with log.step("reading data and model"):
        plan = make_plan_together(run, comm)
    every_callback = all_callbacks(run, callbacks)
    all_or_none(comm, lambda: check_metrics(every_callback, plan))
    check_same_source(run, comm)
    check_same_layout(plan, comm)
    data_fingerprint, notes = read_data(plan, comm, log, [out, *resume_folders(resume)])
    all_or_none(comm, lambda: check_resume(out, point, plan, data_fingerprint))
    if resume == "fresh":
        all_or_none(comm, lambda: check_weights_stay(out, plan.run))
    notes += recovered
    return CheckedRun(plan, point, every_callback, data_fingerprint, notes, threads)


def _build(plan: Plan, comm: Comm, resources: ExitStack) -> RankJob:
    """Build this rank and start its worker processes. Collective over all ranks."""
    job = build_rank(plan, comm)
    if job.workers is not None:
        resources.callback(job.workers.stop)
    all_or_none(comm, job.start_workers)
    return job


def _attach_ema(callbacks: Sequence[Callback], job: RankJob) -> Ema | None:
    """Let the engine update the averaged weights, where the run has them."""
    ema = next((each for each in callbacks if isinstance(each, Ema)), None)
    if ema is not None:
        ema.attach(job.engine.blocks)
        job.engine.update_step.after_update = ema.update
    return ema


def _start_records(job: RankJob, totals: RunTotals, out: Path, comm: Comm) -> None:
    """Write the plan, and record norms and the timeline where the run has them. Collective."""
    run = job.plan.run
    job.engine.update_step.records_norms = run.log.norms
    all_or_none(comm, lambda: None if comm.rank else write_plan(job.plan, totals, out))
    if run.settings.trace:
        job.engine.trace = start_trace(job, comm, out, totals)


def _start_message(
    checked: CheckedRun,
    job: RankJob,
    monitor: Monitor,
    merged_replicas: int,
    fingerprint: Table,
    comm: Comm,
    log: StartLog,
) -> Callable[[], None]:
    """Gather what the start of a run says; return the function that prints it."""
    plan, point = job.plan, checked.point
    notes = [
        *checked.notes,
        *placement_warnings(plan, comm.topology.node_numbers, comm.hosts),
        *data_path_notes(point.run_table, plan.run),
        *damage_notes(point),
        *source_notes(point.fingerprint, fingerprint["source"]),
    ]
    layers = layer_notes(plan, job.engine.blocks, job.train_loader, comm)
    copied_blocks = job.copied_blocks if point.checkpoint is None else []

    def show_start() -> None:
        log.print_head()
        monitor.start(checked.threads, merged_replicas, copied_blocks, layers, notes)

    return show_start
