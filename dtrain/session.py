"""Session: one training of a run, step by step; `dtrain.train` and a user's own loop drive it.

Invariant: until the first segment all ranks raise an error or none does. Afterwards the first rank
that fails ends the job. Collective work is done at the ends of segments.

::

    with Session(run, out) as session:           lock the folder, restore, build this rank
        for segment in session.segments():       the stretches between two pipeline flushes
            for update in session.updates(segment): ...
            session.finish(segment)              syncs settle, records of all ranks are added up
            session.evaluate(); session.save()
                                                 digest, summary, unlock the folder
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, final

from torch import nn

from dtrain.build import RankJob, build_rank, check_same_data, check_same_layout, set_threads
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
from dtrain.comm.flight_recorder import print_error
from dtrain.config.run import RunConfig
from dtrain.data.dataset import Standardised
from dtrain.data.sampler import epoch_order
from dtrain.engine.trace import TRACE_FILE, Trace
from dtrain.errors import ConfigError, DtrainError, RankLostError
from dtrain.evaluation import EvalWeights, evaluate_weights, evaluation_weights
from dtrain.failure import report_failure
from dtrain.layer_notes import layer_notes
from dtrain.measured_cuts import settle_cuts
from dtrain.monitoring.progress import Progress
from dtrain.monitoring.run_totals import RunTotals
from dtrain.monitoring.summary import make_summary
from dtrain.planning import report
from dtrain.planning.plan import Plan, make_plan
from dtrain.rank_process import init
from dtrain.run import Run
from dtrain.schedules.segments import Segment
from dtrain.schema import Table

EventKind = Literal["start", "update", "segment", "evaluation", "checkpoint", "end"]


@final
@dataclass(frozen=True)
class Event:
    """An event of a session, for callbacks.

    Attributes
    ----------
    kind : str
        "start": before the first segment. "update": after each update. "segment": a segment has
        ended. "evaluation": the model was tested. "checkpoint": one was saved. "end": the run ends.
    segment : Segment or None
        The segment that is open or has just ended.
    update : int
        Number of updates done.
    """

    kind: EventKind
    segment: Segment | None
    update: int


Callback = Callable[["Session", Event], object]
"""A function that a session calls on all ranks."""


_RUNS: dict[Path, RunConfig] = {}
"""The runs of this process by their folders: their objects cannot always be imported."""


def run_of_folder(folder: Path) -> RunConfig | None:
    """Return the run that a session of this process trained into a folder."""
    return _RUNS.get(folder.resolve())


class Session:
    """One training of a run into a folder. Every method but `losses` is collective.

    Parameters
    ----------
    run : Run or RunConfig
        What is trained.
    out : str or Path, optional
        The run folder; the newest checkpoint in it is restored. Default: ``runs/`` and the name of
        the run file or script.
    resume : str
        "auto": resume from the newest checkpoint in `out`, if there is one. "never": `out` must be
        empty. Else the folder of another run to resume from.
    callbacks : sequence of callable
        Called with (session, event) on all ranks.
    exact_mesh : bool
        Refuse ranks on which the stages of the run do not fit. Otherwise as many stages are taken
        as fit, and the other ranks are replicas.
    comm : Comm, optional
        All ranks; default: those of `dtrain.init`.
    """

    def __init__(
        self,
        run: Run | RunConfig,
        out: str | Path | None = None,
        *,
        resume: str = "auto",
        callbacks: Sequence[Callback] = (),
        exact_mesh: bool = False,
        comm: Comm | None = None,
    ) -> None:
        self.comm = init() if comm is None else comm
        self.callbacks = tuple(callbacks)
        config = run if isinstance(run, RunConfig) else run.config
        self.out = Path("runs") / config.path.stem if out is None else Path(out)
        self._run = config if exact_mesh else config.fit_stages(self.comm.size)
        self._resume = resume
        self._owner: run_folder.Owner | None = None
        self._progress: Progress | None = None
        self._segment: Segment | None = None
        self._updates: Iterator[int] = iter(())
        self._stop_reason: str | None = None
        self._summary: dict[str, Any] | None = None
        self._eval_weights: EvalWeights | None = None

    # ---- start and end

    def __enter__(self) -> Session:
        """Lock the folder, build this rank and restore the newest checkpoint.

        Raises
        ------
        DtrainError
            On all ranks.
        """
        try:
            self._open()
        except BaseException as error:
            self._close(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the summary and unlock the folder. A session that is left before its last update
        trains to the end of its segment; its status is "stopped"."""
        try:
            if error is None:
                self._complete()
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._close(error)

    def _open(self) -> None:
        comm, out = self.comm, self.out
        _share_module(self._run.model.target, comm)
        threads = set_threads(self._run, comm)
        point = find_resume_point(comm, out, self._resume)
        run = settle_cuts(self._run.with_checkpoint_blocks(point.run_table), comm)
        plan = all_or_none(comm, lambda: make_plan(run, comm.size))
        check_same_layout(plan, comm)
        data_fingerprint = check_same_data(plan, comm)
        is_trained = point.updates >= plan.training_length.total_updates
        all_or_none(comm, lambda: check_same_run(out, point.run_table, plan.run, is_trained))
        all_or_none(comm, lambda: check_saved_data(point.fingerprint, data_fingerprint))
        self._owner, attempt = broadcast_object(
            comm, lambda: _acquire_folder(out, self._resume, point)
        )
        all_or_none(comm, lambda: run_folder.check_visible(out, comm.hosts[comm.rank]))
        comm.flight.set_folder(out / run_folder.FLIGHT_FOLDER)
        _RUNS[out.resolve()] = plan.run
        self._job = job = build_rank(plan, comm)
        self._fingerprint: Table = {"model": job.model_fingerprint, "data": data_fingerprint}
        all_or_none(comm, lambda: check_same_model(point.fingerprint, job.model_fingerprint))
        self._totals, merged_replicas = _restore(job, point)
        self._totals.attempt = attempt
        self._progress = Progress(plan, comm, out, self._totals)
        if comm.rank == 0:
            _write_plan(plan, self._totals, out)
        if plan.run.settings.trace:
            job.engine.trace = _start_trace(job, comm, out, self._totals)
        copied_blocks = job.copied_blocks if point.checkpoint is None else []
        notes = layer_notes(plan, job.engine.blocks, job.train_loader, comm)
        self._progress.start(threads, merged_replicas, copied_blocks, notes)
        self._notify("start")

    def _complete(self) -> None:
        """Reach the end of the segment, then write the summary with the model's digest."""
        if self._segment is not None:
            for _ in self._updates:
                pass
            self.finish(self._segment)
        self._notify("end")
        summary = self._finished_summary()
        assert self._progress is not None
        self._progress.finish(summary)

    def _finished_summary(self) -> dict[str, Any]:
        totals = self._totals
        is_finished = totals.update >= self.plan.training_length.total_updates
        if is_finished and totals.tested != totals.update:  # resumed, from a checkpoint not tested
            self.evaluate()
        digest = self.digest()
        totals.tick()
        status = "finished" if is_finished or self._stop_reason is not None else "stopped"
        self._summary = make_summary(self.plan, totals, status, digest)
        if self.rank == 0:
            run_folder.write_summary(self.out, self._summary)
        return self._summary

    def _close(self, error: BaseException | None) -> None:
        """Record a failure, release the folder, and leave the terminal as it was."""
        try:
            if error is not None:
                report_failure(error, self.comm, self.out, self._owner)
            if isinstance(error, SystemExit) and self.comm.size > 1:  # the other ranks go on
                print_error(f"dtrain: rank {self.rank} left its session by sys.exit")
                self.comm.abort(RankLostError.code)
        finally:
            self.comm.flight.close()
            if self._progress is not None:
                self._progress.stop()
            if self._owner is not None and self.rank == 0:
                run_folder.release(self.out, self._owner)

    # ---- position

    @property
    def rank(self) -> int:
        """This rank."""
        return self.comm.rank

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self._job.plan

    @property
    def update(self) -> int:
        """Updates done at the end of the last finished segment, over all attempts."""
        return self._totals.update

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.update // self.plan.training_length.updates_per_epoch

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per epoch, over all attempts; the same on all ranks."""
        return self._totals.history

    def losses(self) -> dict[int, float]:
        """Return the mean loss so far in this segment of each block of this rank, by block."""
        return self._job.engine.metric_sums.mean_losses()

    def stop(self, reason: str) -> None:
        """Let `segments` end after this one. All ranks have to call it."""
        self._stop_reason = reason

    # ---- training

    def segments(self) -> Iterator[Segment]:
        """Yield the segments that are left. The ranks agree before each one whether to stop."""
        for segment in self.plan.training_length.segments(self.update):
            if any(self._job.groups.control.allgather_object(self._stop_reason is not None)):
                return
            yield segment

    def updates(self, segment: Segment) -> Iterator[int]:
        """Train the updates of a segment; yield the number of each, from 0 in the run."""
        if self._segment is not None:
            raise ConfigError(
                "session.segment-unfinished",
                f"segment {self._segment.start} to {self._segment.stop} is not finished: call "
                "session.finish(segment) before the next one",
            )
        self._segment, self._eval_weights = segment, None
        plan, job = self.plan, self._job
        order = epoch_order(
            plan.data.train.size, plan.run.settings.seed, segment.epoch, plan.run.data.shuffle
        )
        end = segment.offset + segment.stop - segment.start
        batches = [
            plan.batch_splitter.batch(order, offset, job.position.replica)
            for offset in range(segment.offset, end)
        ]
        self._order_size = len(order)
        traffic = job.groups.control.traffic
        self._bytes_before = traffic.bytes_intra, traffic.bytes_inter
        self._updates = job.engine.run(job.train_loader, batches, segment.start, segment.epoch)
        assert self._progress is not None
        for update in self._updates:
            self._progress.show(update)
            if self.callbacks:
                self._notify("update", update + 1)
            yield update

    def finish(self, segment: Segment) -> None:
        """End a segment: syncs settle, and the records of all ranks are added up."""
        for _ in self._updates:  # those that the caller left out
            pass
        job, totals = self._job, self._totals
        if job.engine.trace is not None:
            end = segment.offset + segment.stop - segment.start
            splitter = self.plan.batch_splitter
            job.engine.trace.write_segment(
                splitter.count_micro_batches(self._order_size, segment.offset, end)
            )
        for sync in job.engine.syncs.values():
            sync.finish_pending()
        totals.add_segment(
            job.groups.control.allgather_object(self._segment_record()),
            segment,
            len(job.engine.block_specs),
            self.plan.layout.mesh.stages,
        )
        if segment.ends_epoch:
            for sync in job.engine.syncs.values():
                sync.end_epoch(totals.train_loss or 0.0)
        self._segment = None
        totals.tick()
        totals.add_history(segment)
        assert self._progress is not None
        self._progress.end_segment()
        self._write_running_summary()
        self._notify("segment", segment=segment)

    def _segment_record(self) -> dict[str, Any]:
        """Return what this rank measured in the segment."""
        job, (intra_before, inter_before) = self._job, self._bytes_before
        engine, traffic = job.engine, job.groups.control.traffic
        return {
            "stage": job.position.stage,
            **asdict(engine.metric_sums),
            "bytes_intra_node": traffic.bytes_intra - intra_before,
            "bytes_inter_node": traffic.bytes_inter - inter_before,
            "peak_live": engine.peak_live,
            "peak_bytes": engine.peak_bytes(),
            "rss_bytes": _rss_bytes(),
            "weights": _low_rank_stats(job),
        }

    # ---- evaluation and checkpoints

    def evaluate(self) -> dict[str, float | None]:
        """Test the evaluation weights of the syncs.

        Returns
        -------
        dict of str to float
            The metrics of the task by name, and "loss"; the same on all ranks.
        """
        self._refuse_open_segment("evaluate")
        job, totals, start = self._job, self._totals, time.perf_counter()
        totals.test = evaluate_weights(
            job, self._evaluation_weights(), job.test_loader, self.plan.batch_splitter
        )
        totals.tested = totals.update
        totals.tick()
        totals.add_history_test()
        assert self._progress is not None
        self._progress.end_evaluation(time.perf_counter() - start)
        self._write_running_summary()
        self._notify("evaluation")
        return {"loss": totals.test["test_loss"], **totals.test["metrics"]}

    def save(self) -> None:
        """Write the checkpoint that a next start goes on from."""
        self._refuse_open_segment("save")
        self._totals.tick()
        start = time.perf_counter()
        _save_checkpoint(
            self._job, self._evaluation_weights(), self._totals, self.out, self._fingerprint
        )
        assert self._progress is not None
        self._progress.end_save(time.perf_counter() - start)
        self._write_running_summary()
        self._notify("checkpoint")

    def digest(self) -> str:
        """Return the SHA-256 of the evaluated model."""
        self._refuse_open_segment("digest")
        weights = self._evaluation_weights()
        own_tensors = {
            name: tensor
            for tensors in (() if self._job.position.replica else weights.values())
            for name, tensor in tensors.items()
        }
        return model_digest(own_tensors, self._job.groups.control)

    def summary(self) -> dict[str, Any]:
        """Return the contents of `summary.json` at this moment; not collective."""
        if self._summary is not None:
            return self._summary
        return make_summary(self.plan, self._totals, "running")

    def _evaluation_weights(self) -> EvalWeights:
        """Return the evaluation weights of the syncs, computed once between two segments."""
        if self._eval_weights is None:
            self._eval_weights = evaluation_weights(self._job)
        return self._eval_weights

    def _refuse_open_segment(self, method: str) -> None:
        if self._segment is not None:
            raise ConfigError(
                "session.segment-open",
                f"session.{method}() inside a segment, where blocks are at different updates: call "
                "session.finish(segment) first, or set `segment` or [checkpoint] every in the run "
                "for shorter segments",
            )

    def _write_running_summary(self) -> None:
        if self.rank == 0:
            run_folder.write_summary(self.out, make_summary(self.plan, self._totals, "running"))

    def _notify(
        self, kind: EventKind, update: int | None = None, segment: Segment | None = None
    ) -> None:
        """Call the callbacks."""
        for callback in self.callbacks:
            number = self.update if update is None else update
            callback(self, Event(kind, segment or self._segment, number))


def _share_module(model: object, comm: Comm) -> None:
    """Give a module that the user made the weights that it has on rank 0. Collective over all."""
    if isinstance(model, nn.Module) and comm.size > 1:
        tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
        with comm.without_counting():
            comm.broadcast_([tensor for tensor in tensors.values() if tensor.numel()])


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


def _low_rank_stats(job: RankJob) -> Mapping[str, Any]:
    """Return rank and traffic of the weights that may be products; replica 0 reports for all."""
    syncs = () if job.position.replica else job.engine.syncs.values()
    return {name: stats for sync in syncs for name, stats in sync.low_rank_stats().items()}


def _rss_bytes() -> int:
    """Return the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
