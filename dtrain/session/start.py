"""The steps with which a session starts: lock the folder, restore a checkpoint, write the plan.

Invariant: nothing of an earlier run is overwritten before all ranks have accepted the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dtrain.block.block import Block
from dtrain.block.device import release_freed_memory
from dtrain.build import RankJob, check_same_data, hold_data
from dtrain.callbacks import (
    BestCheckpoint,
    Callback,
    EarlyStopping,
    Ema,
    RateOnPlateau,
    callback_keys,
)
from dtrain.checkpoint import run_folder, store
from dtrain.checkpoint.manifest import Manifest, read_manifest
from dtrain.checkpoint.resume import ResumePoint
from dtrain.checkpoint.same_run import check_same_run, data_path_changes
from dtrain.checkpoint.saved_fingerprint import check_saved_data
from dtrain.comm.agree import all_or_none
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data.statistics.kept_statistics import STATISTICS_FILE, kept_text
from dtrain.data.statistics.shared_statistics import share_statistics, use_kept_statistics
from dtrain.data.statistics.standardise import find_standardised
from dtrain.engine.engine import segments_are_free
from dtrain.engine.trace import TRACE_FILE, Trace
from dtrain.errors import ConfigError
from dtrain.monitoring.metric_values import check_metric_name, metric_names
from dtrain.monitoring.run_totals import RunTotals
from dtrain.monitoring.start_log import StartLog
from dtrain.monitoring.summary import make_summary
from dtrain.planning import report
from dtrain.planning.plan import Plan
from dtrain.schema import Table
from dtrain.session.data_notes import (
    check_data_repeatable,
    data_notes,
    memory_notes,
    same_draws,
)
from dtrain.session.job_limit import JobLimit, find_limit
from dtrain.tracking.recorder import Recorder, make_trackers


def check_resume(out: Path, point: ResumePoint, plan: Plan, data_fingerprint: Table) -> None:
    """Refuse settings or data that are not those of the checkpoint, if there is one."""
    is_trained = point.updates >= plan.training_length.total_updates
    knows_data = "data" in point.fingerprint
    layout = plan.layout
    is_free = segments_are_free(layout.objective, layout.schedule, layout.routes)
    check_same_run(out, point.run_table, plan.run, is_trained, knows_data, is_free)
    changes = data_path_changes(point.run_table, plan.run)
    check_saved_data(point.fingerprint, data_fingerprint, changes)


def check_weights_stay(out: Path, run: RunConfig) -> None:
    """Refuse initial weights in the folder that is moved aside."""
    path = run.weights_path
    if path is not None and path.resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            "run-folder.fresh-moves-weights",
            f"--fresh would move {out}, which holds [model] weights: choose another --out",
        )


def share_module(model: object, comm: Comm) -> None:
    """Give a module that the user made the weights that it has on rank 0. Collective over all."""
    if isinstance(model, nn.Module) and comm.size > 1:
        tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
        with comm.without_counting():
            comm.broadcast_([tensor for tensor in tensors.values() if tensor.numel()])


def resume_folders(resume: str) -> list[Path]:
    """Return the folder of the other run that is resumed, if there is one."""
    return [] if resume in ("auto", "never", "fresh") else [Path(resume)]


def read_data(
    plan: Plan, comm: Comm, log: StartLog, folders: Sequence[Path]
) -> tuple[dict[str, Any], list[str]]:
    """Hold the data in memory as far as they fit and check them. Collective over all ranks.

    Statistics that one of `folders` keeps of these data are not computed again. Returns what
    identifies the data in a later start, and notes on them.

    Raises
    ------
    DataError
        On all ranks, if the data cannot be read or are not legal.
    """
    with log.step("reading data into memory"):
        is_held = hold_data(plan, comm)
    with log.step("reading data and computing their statistics"):
        check_data_repeatable(plan, comm)
        use_kept_statistics(plan.data, comm, folders)
        share_statistics(plan.data, comm, log.note)
        fingerprint = check_same_data(plan, comm) | same_draws(plan, comm)
        notes = data_notes(plan, comm)
    if is_held:
        release_freed_memory()
        notes += memory_notes(plan, comm)
    return fingerprint, notes


def check_metrics(callbacks: Sequence[Callback], plan: Plan) -> None:
    """Refuse callbacks whose metric the run does not measure."""
    run = plan.run
    has_ema = run.ema is not None and run.ema.evaluate
    names = metric_names(plan.layout.task, plan.data.validation is not None, has_ema)
    for callback in callbacks:
        if isinstance(callback, BestCheckpoint | EarlyStopping | RateOnPlateau):
            check_metric_name(callback.metric, f"metric of '{callback.key}'", names)


def restore_run(
    job: RankJob, point: ResumePoint, callbacks: Sequence[Callback], ema: Ema | None
) -> tuple[RunTotals, int]:
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
        states = manifest.state.get("callbacks", {})
        for key, callback in callback_keys(callbacks).items():
            if key in states:
                callback.restore(states[key])
        if ema is not None:
            _restore_ema(manifest, ema, engine.blocks)
        totals = RunTotals.from_state(manifest.state)
        if engine.update_step.skips is not None:
            engine.update_step.skips.restore(totals.skips)
        return totals, 0 if same else manifest.replicas

    return all_or_none(job.groups.control, restore_rank)


def _restore_ema(manifest: Manifest, ema: Ema, blocks: Mapping[int, Block]) -> None:
    """Load the averaged weights of this rank's blocks."""
    averages = {f"ema/{n}": t for index in blocks for n, t in ema.weights(index).items()}
    for key, tensor in manifest.load_like(averages).items():
        averages[key].copy_(tensor)


def write_plan(plan: Plan, totals: RunTotals, out: Path) -> None:
    """Write the resolved run, its plan, the statistics of its data and a first summary, once every
    rank accepted the run. Errors are those of `run_folder.write_record`."""
    texts = {"run.toml": plan.run.to_text(), "plan.txt": report.plan_text(plan)}
    standardised = find_standardised(plan.data.train)
    if standardised is not None and standardised.training.is_computed:
        texts[STATISTICS_FILE] = kept_text(standardised.training)
    for name, text in texts.items():
        run_folder.write_record(out, name, text)
    run_folder.write_summary(out, make_summary(plan, totals, "running"))


def start_trace(job: RankJob, comm: Comm, out: Path, totals: RunTotals) -> Trace:
    """Return the recorder of when this rank computes what. Collective over `comm`."""
    layout = job.plan.layout
    return Trace(
        comm, job.position, layout.schedule, layout.routes, out / TRACE_FILE, totals.wall_s
    )


def make_recorder(run: RunConfig, comm: Comm) -> Recorder:
    """Return the trackers of rank 0, and none on the other ranks."""
    return Recorder(make_trackers(run.log.trackers, run.folder) if comm.rank == 0 else ())


def observed_limit(run: RunConfig, comm: Comm) -> JobLimit | None:
    """Return the end of the job on rank 0, if the run stops before it, and None elsewhere."""
    return find_limit(run.checkpoint.stop_before_limit) if comm.rank == 0 else None
