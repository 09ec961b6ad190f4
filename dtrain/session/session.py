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

import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from dtrain.build import (
    RankJob,
    build_rank,
    check_same_layout,
    make_plan_together,
    set_threads,
)
from dtrain.callbacks import (
    BestCheckpoint,
    Callback,
    Ema,
    Event,
    EventKind,
    all_callbacks,
    callback_keys,
    with_callback_keys,
)
from dtrain.checkpoint import ownership, run_folder, store
from dtrain.checkpoint.digest import model_digest
from dtrain.checkpoint.resume import (
    BEST_FOLDER,
    CHECKPOINT_FOLDER,
    ResumePoint,
    check_same_model,
    damage_notes,
    data_path_notes,
    find_resume_point,
    source_hashes,
    source_notes,
)
from dtrain.comm.agree import all_or_none, broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.comm.early_end import EarlyEnd
from dtrain.comm.flight_recorder import print_error
from dtrain.config.out_folder import fill_keys
from dtrain.config.run import RunConfig
from dtrain.data.reading.worker_pool import WorkerPool
from dtrain.data.statistics.standardise import Standardised
from dtrain.engine.metrics import MetricSums
from dtrain.errors import ConfigError, RankLostError
from dtrain.evaluation import EvalWeights, evaluate_weights, evaluation_weights
from dtrain.monitoring.machine_peak import measured_peak
from dtrain.monitoring.metric_values import (
    higher_is_better,
    metric_values,
    rename_evaluation,
)
from dtrain.monitoring.monitor import Monitor
from dtrain.monitoring.start_log import StartLog
from dtrain.monitoring.summary import make_summary
from dtrain.planning.plan import Plan
from dtrain.planning.warnings import placement_warnings
from dtrain.rank_process import defer_stop_signals, end_at_signals, init
from dtrain.run import Run
from dtrain.schedules.segments import Segment
from dtrain.schema import Table
from dtrain.session.data_notes import check_data_values
from dtrain.session.failure import report_failure
from dtrain.session.job_limit import JobLimit
from dtrain.session.layer_notes import layer_notes
from dtrain.session.measured_cuts import settle_cuts
from dtrain.session.requests import reason, signal_request, stops
from dtrain.session.run_clock import RunClock
from dtrain.session.same_program import check_same_program, check_same_source
from dtrain.session.segment_record import segment_record
from dtrain.session.start import (
    acquire_folder,
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
from dtrain.user_code import refuse_during_import

SEARCH_S = 60.0
"""Seconds in which a test loss that is not finite is searched for in the data, once."""


__all__ = ["Callback", "Event", "EventKind", "Session"]


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
        the run file or script. ``{seed}`` and the like are keys of the run; see `fill_keys`.
    resume : str
        "auto": resume from the newest checkpoint in `out`, if there is one. "never": `out` must be
        empty. "fresh": start anew; what `out` holds is moved to ``out.old-1`` or a higher number.
        Else the folder of another run to resume from.
    callbacks : sequence of callable
        Called with (session, event) on all ranks. Those of `dtrain.callbacks` are other spellings
        of keys of the run.
    exact_mesh : bool
        Refuse ranks on which the stages of the run do not fit. Otherwise as many stages are taken
        as fit, and the other ranks are replicas.
    comm : Comm, optional
        All ranks; default: those of `dtrain.init`.

    Attributes
    ----------
    callbacks : tuple of callable
        Those of the run's keys, and the given ones.
    stop_reason : str or None
        Why the run ends before its last update; the same on all ranks once `segments` has ended.
    interrupted : bool
        Whether the run was stopped by a signal or by the time limit of the job: `segments`
        saves and ends. The same on all ranks after `finish`.
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
        refuse_during_import()
        self.comm = init() if comm is None else comm
        self.callbacks = tuple(callbacks)
        config = run if isinstance(run, RunConfig) else run.config
        folder = Path("runs") / config.path.stem if out is None else Path(out)
        self.out = all_or_none(self.comm, lambda: fill_keys(folder, config))
        self._run = config if exact_mesh else config.fit_stages(self.comm.size)
        self._resume = resume
        self._owner: ownership.Owner | None = None
        self._heartbeat: ownership.Heartbeat | None = None
        self._progress: Monitor | None = None
        self._segment: Segment | None = None
        self._updates: Iterator[int] = iter(())
        self._ema: Ema | None = None
        self._workers: WorkerPool | None = None
        self._searched_data = False
        self._early_end: EarlyEnd | None = None
        self._clock: RunClock | None = None
        self._limit: JobLimit | None = None
        self._ended_early = False
        self._save_requested = False
        self.stop_reason: str | None = None
        self.interrupted = False
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
        trace: TracebackType | None,
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
        comm, out, log = self.comm, self.out, StartLog(self.comm)
        check_same_program(self._run, comm)
        share_module(self._run.model.target, comm)
        threads = set_threads(self._run, comm)
        point = find_resume_point(comm, out, self._resume)
        given = self.callbacks
        run = all_or_none(comm, lambda: with_callback_keys(self._run, given))
        run = settle_cuts(run.with_checkpoint_blocks(point.run_table), comm)
        with log.step("reading data and model"):
            plan = make_plan_together(run, comm)
        self.callbacks = all_callbacks(run, given)
        all_or_none(comm, lambda: check_metrics(self.callbacks, plan))
        check_same_source(run, comm)
        check_same_layout(plan, comm)
        folders = [out, *resume_folders(self._resume)]
        data_fingerprint, notes = read_data(plan, comm, log, folders)
        all_or_none(comm, lambda: check_resume(out, point, plan, data_fingerprint))
        if self._resume == "fresh":
            all_or_none(comm, lambda: check_weights_stay(out, plan.run))
        recorder = all_or_none(comm, lambda: make_recorder(plan.run, comm))
        self._limit = all_or_none(comm, lambda: observed_limit(plan.run, comm))
        self._owner, attempt = broadcast_object(
            comm, lambda: acquire_folder(out, self._resume, point)
        )
        if comm.rank == 0:
            self._heartbeat = ownership.Heartbeat(out)
        all_or_none(comm, lambda: ownership.check_visible(out, comm.hosts[comm.rank]))
        comm.flight.set_folder(out / run_folder.FLIGHT_FOLDER)
        _RUNS[out.resolve()] = plan.run
        with log.step("building the blocks"):
            job = self._build(plan)
        self._fingerprint: Table = {
            "model": job.model_fingerprint,
            "data": data_fingerprint,
            "source": source_hashes(plan.run),
        }
        all_or_none(comm, lambda: check_same_model(point.fingerprint, job.model_fingerprint))
        job.engine.update_step.records_norms = plan.run.log.norms
        self._attach_ema()
        self._totals, merged_replicas = restore_run(job, point, self.callbacks, self._ema)
        self._totals.attempt = attempt
        if job.engine.update_step.skips is not None:
            job.engine.update_step.skips.restore(self._totals.skips)
        self._peak_flops = measured_peak(job.engine.engine_spec.device, plan.layout.dtype)
        self._progress = Monitor(plan, comm, out, self._totals, recorder)
        all_or_none(comm, lambda: None if comm.rank else write_plan(plan, self._totals, out))
        if plan.run.settings.trace:
            job.engine.trace = start_trace(job, comm, out, self._totals)
        copied_blocks = job.copied_blocks if point.checkpoint is None else []
        layers = layer_notes(plan, job.engine.blocks, job.train_loader, comm)
        notes += placement_warnings(plan, comm.hosts) + data_path_notes(point.run_table, plan.run)
        notes += damage_notes(point)
        notes += source_notes(point.fingerprint, self._fingerprint["source"])
        self._listen(point)
        log.print_head()
        self._progress.start(threads, merged_replicas, copied_blocks, layers, notes)
        self._notify("start")

    def _listen(self, point: ResumePoint) -> None:
        """Act on stop signals and on the clock at the next possible update from now on.

        Collective over all ranks.
        """
        assert self._progress is not None
        self._saved_update = point.updates
        in_segments = self._job.engine.may_end_early
        early_end = EarlyEnd(self.comm.dup("early end"), in_segments)
        if self.rank == 0:
            self._clock = RunClock(
                early_end, self.plan, self._progress.note, self._limit, self._totals.update
            )
            early_end.clock = self._clock.check
        self._early_end = early_end
        defer_stop_signals(self.interrupt, self.plan.run.checkpoint.signals)

    def _build(self, plan: Plan) -> RankJob:
        """Build this rank and start its worker processes. Collective over all ranks."""
        self._job = job = build_rank(plan, self.comm)
        self._workers = job.workers
        all_or_none(self.comm, job.start_workers)
        return job

    def _attach_ema(self) -> None:
        """Let the engine update the averaged weights, where the run has them."""
        self._ema = next((each for each in self.callbacks if isinstance(each, Ema)), None)
        if self._ema is not None:
            self._ema.attach(self._job.engine.blocks)
            self._job.engine.update_step.after_update = self._ema.update

    def _complete(self) -> None:
        """Reach the end of the segment, then write the summary with the model's digest."""
        if self._segment is not None:
            self.finish(self._segment)
        self._stop_listening()
        self._notify("end")
        summary = self._finished_summary()
        assert self._progress is not None
        self._progress.finish(summary)
        with self.comm.without_counting():
            self.comm.allgather_object(None)  # the summary is there before a rank reads it

    def _stop_listening(self) -> None:
        """End the agreement; later signals change nothing. Collective over all ranks."""
        early_end = self._early_end
        assert early_end is not None
        is_open = early_end.disable()
        if any(self._job.groups.control.allgather_object(is_open)):
            early_end.settle(1, self.update)
        early_end.close()

    def _finished_summary(self) -> dict[str, Any]:
        totals = self._totals
        is_finished = totals.update >= self.plan.training_length.total_updates
        is_finished |= self.stop_reason is not None
        if self.interrupted:  # the rest of the time is short
            totals.tick()
            self._summary = self._make_summary("stopped")
            if self.rank == 0:
                run_folder.write_summary(self.out, self._summary)
            return self._summary
        if is_finished and totals.tested != totals.update:  # resumed, from a checkpoint not tested
            self.evaluate(scheduled=False)
        digest = self.digest()
        totals.tick()
        self._summary = self._make_summary("finished" if is_finished else "stopped", digest)
        if self.rank == 0:
            run_folder.write_summary(self.out, self._summary)
        return self._summary

    def _close(self, error: BaseException | None) -> None:
        """Record a failure, release the folder, and leave the terminal as it was."""
        try:
            if error is not None:
                report_failure(error, self.comm, self.out, self._owner)
            if isinstance(error, SystemExit) and self.comm.size > 1:  # the other ranks go on
                print_error("".join(traceback.format_exception(error)).rstrip())
                print_error(f"dtrain: rank {self.rank} left its session by sys.exit")
                self.comm.abort(RankLostError.code)
        finally:
            if self._early_end is not None:
                end_at_signals()
                self._early_end.close()
            if self._limit is not None:
                self._limit.close()
            if self._workers is not None:
                self._workers.stop()
            self.comm.flight.close()
            if self._progress is not None:
                self._progress.stop()
            if self._heartbeat is not None:
                self._heartbeat.stop()
            if self._owner is not None and self.rank == 0:
                ownership.release(self.out, self._owner)

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
    def saved_update(self) -> int:
        """Updates that the newest checkpoint of the run holds."""
        return self._saved_update

    @property
    def evaluation_pending(self) -> bool:
        """Whether the run was stopped at the end of a segment, before its evaluation."""
        return self._totals.evaluation_pending

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.update // self.plan.training_length.updates_per_epoch

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per epoch, over all attempts; the same on all ranks."""
        return self._totals.history

    def metric(self, name: str) -> float | None:
        """Return a metric of the latest evaluation, "test_loss" for example; None where it is not
        finite or not measured yet. Not collective; the same on all ranks."""
        return metric_values(self._totals).get(name)

    def higher_is_better(self, name: str) -> bool:
        """Return whether a larger value of a metric is better."""
        return higher_is_better(name, self.plan.layout.task)

    def set_lr_scale(self, scale: float) -> None:
        """Multiply the learning rates of the updates of later segments. All ranks call it."""
        self._job.engine.update_step.lr_scale = scale

    def losses(self) -> dict[int, float]:
        """Return the mean loss so far in this segment of each block of this rank, by block."""
        return self._job.engine.metric_sums.mean_losses()

    def stop(self, reason: str) -> None:
        """Let `segments` end after this one. All ranks have to call it."""
        self.stop_reason = reason

    # ---- training

    def interrupt(self, signal_number: int = signal.SIGTERM) -> None:
        """Let the run save and end at the next possible update, as after a signal.

        One rank may call it, or several; a signal handler, too.
        """
        if self._early_end is not None:
            request = signal_request(signal_number)
            self._early_end.requested = max(self._early_end.requested, request)

    def segments(self) -> Iterator[Segment]:
        """Yield the segments that are left. The ranks agree before each one whether to stop.

        A run that was stopped early saves a checkpoint and yields no further segment.
        """
        for segment in self.plan.training_length.segments(self.update):
            self._agree_to_begin(segment)
            self._save_if_requested()
            if self.stop_reason is not None:
                return
            yield segment
        self._save_if_requested()

    def _agree_to_begin(self, segment: Segment) -> None:
        """Set on all ranks whether one of them stops the run, or wants a checkpoint."""
        early_end, begun = self._early_end, segment.start + 1
        assert early_end is not None
        rows = self._job.groups.control.allgather_object(
            [self.stop_reason, early_end.announce(begun)]
        )
        self.stop_reason = next((reason for reason, _ in rows if reason is not None), None)
        self._act_on(early_end.settle(max(request for _, request in rows), begun))

    def _act_on(self, request: int) -> None:
        """Note what all ranks have agreed to do."""
        assert self._early_end is not None
        if stops(request):
            self._early_end.disable()
        if stops(request) and self.stop_reason is None:
            self.interrupted, self.stop_reason = True, reason(request)
        self._save_requested |= request > 0

    def _save_if_requested(self) -> None:
        if self._save_requested and self._saved_update != self.update:
            self.save()
        self._save_requested = False

    def updates(self, segment: Segment) -> Iterator[int]:
        """Train the updates of a segment; yield the number of each, from 0 in the run.

        A run that was stopped early yields fewer.
        """
        if self._segment is not None:
            raise ConfigError(
                "session.segment-unfinished",
                f"segment {self._segment.start} to {self._segment.stop} is not finished: call "
                "session.finish(segment) before the next one",
            )
        self._segment, self._ended_early = segment, False
        self._updates = self._train_segment(segment)
        assert self._progress is not None
        for update in self._updates:
            self._progress.show(update)
            if self._clock is not None:
                self._clock.note_update(update)
            if self.callbacks:
                self._notify("update", update + 1)
            yield update

    def _train_segment(self, segment: Segment) -> Iterator[int]:
        """Train a segment, in parts where a checkpoint was asked for; yield the updates."""
        early_end, part = self._early_end, segment
        assert early_end is not None
        while True:
            yield from self._train_part(part)
            stop = early_end.end_of(part.stop)
            if stop == part.stop:
                return
            self._act_on(self._add_records(replace(part, stop=stop), ended_early=True))
            if self.interrupted:
                self._ended_early = True
                return
            self._segment = None
            self._save_if_requested()
            offset = part.offset + stop - part.start
            self._segment = part = replace(part, offset=offset, start=stop)

    def _train_part(self, segment: Segment) -> Iterator[int]:
        """Train a segment, or the rest of one; yield the number of each update."""
        self._eval_weights = None
        plan, job = self.plan, self._job
        order = plan.epoch_order(segment.epoch)
        end = segment.offset + segment.stop - segment.start
        batches = [
            plan.batch_splitter.batch(order, offset, job.position.replica)
            for offset in range(segment.offset, end)
        ]
        self._order_size = len(order)
        traffic = job.groups.control.traffic
        self._bytes_before = traffic.bytes_intra, traffic.bytes_inter
        position, early_end = job.position, self._early_end
        assert early_end is not None
        earlier = self._totals.earlier_sums(
            position.replica, plan.layout.mesh.replicas, job.engine.blocks
        )
        return job.engine.run(
            job.train_loader,
            batches,
            segment.start,
            segment.epoch,
            early_end if early_end.in_segments else None,
            MetricSums(**earlier),
        )

    def finish(self, segment: Segment) -> None:
        """End a segment: syncs settle, and the records of all ranks are added up.

        A segment that ended early has no record of its own: the
        next start trains the rest of it and records the whole.
        """
        for _ in self._updates:  # those that the caller has not taken
            pass
        totals = self._totals
        if self._ended_early:
            self._segment = None
            totals.tick()
            self._write_running_summary()
            return
        segment = self._segment or segment  # the rest of it, after a checkpoint
        request = self._add_records(segment)
        if segment.ends_epoch:
            for sync in self._job.engine.syncs.values():
                sync.end_epoch(totals.train_loss or 0.0)
        self._segment = None
        totals.tick()
        totals.add_history(segment)
        assert self._progress is not None
        self._progress.end_segment()
        self._write_running_summary()
        self._notify("segment", segment=segment)
        self._act_on(request)
        totals.evaluation_pending = self.interrupted

    def _add_records(self, segment: Segment, ended_early: bool = False) -> int:
        """Add up the records of all ranks; return what the ranks have agreed to do now."""
        job, totals, early_end = self._job, self._totals, self._early_end
        assert early_end is not None
        if job.engine.trace is not None:
            end = segment.offset + segment.stop - segment.start
            splitter = self.plan.batch_splitter
            job.engine.trace.write_segment(
                splitter.count_micro_batches(self._order_size, segment.offset, end)
            )
        for sync in job.engine.syncs.values():
            sync.finish_pending()
        record = segment_record(self._job, self._bytes_before, self._ema, self._peak_flops)
        request = early_end.announce(segment.stop)
        rows = job.groups.control.allgather_object([record, request])
        totals.add_segment(
            [record for record, _ in rows],
            segment,
            len(job.engine.block_specs),
            self.plan.layout.mesh.stages,
            ended_early,
        )
        return early_end.settle(max(request for _, request in rows), segment.stop + ended_early)

    # ---- evaluation and checkpoints

    def evaluate(self, *, scheduled: bool = True) -> dict[str, float | None]:
        """Test the evaluation weights of the syncs, on the validation split where there is one, and
        on the test split.

        Parameters
        ----------
        scheduled : bool
            False: early stopping and learning rates do not count it, since a longer run would not
            have it.

        Returns
        -------
        dict of str to float
            "loss", and the metrics of the task by name: those of the validation split where there
            is one, else of the test split; the same on all ranks. `metric` has those of both.
        """
        self._refuse_open_segment("evaluate")
        totals, start = self._totals, time.perf_counter()
        totals.evaluation_pending = False
        totals.test, totals.evaluations = self._test(self._evaluation_weights())
        if totals.test["test_loss"] is None and not self._searched_data:
            self._searched_data = True
            check_data_values(self.plan, self.comm, SEARCH_S)
        if self._ema is not None and self._ema.evaluate:
            test, others = self._test(self._ema_weights())
            others |= rename_evaluation(test, "test")
            totals.evaluations |= {f"ema_{key}": value for key, value in others.items()}
        totals.tested = totals.update
        totals.tick()
        totals.add_history_test()
        assert self._progress is not None
        eval_s = time.perf_counter() - start
        self._progress.end_evaluation(eval_s)
        if self._clock is not None:
            self._clock.note_evaluation(eval_s)
        self._write_running_summary()
        self._notify("evaluation", scheduled=scheduled)
        values = metric_values(totals)
        return {name: values[name] for name in ("loss", *totals.test["metrics"])}

    def _test(self, weights: EvalWeights) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the evaluation of the test split, and that of the validation split if any."""
        job, splitter = self._job, self.plan.batch_splitter
        validation = {}
        if job.validation_loader is not None:
            metrics = evaluate_weights(job, weights, job.validation_loader, splitter)
            validation = rename_evaluation(metrics, "validation")
        return evaluate_weights(job, weights, job.test_loader, splitter), validation

    def save(self) -> None:
        """Write a checkpoint, from which the next start resumes."""
        self._refuse_open_segment("save")
        self._totals.tick()
        start = time.perf_counter()
        engine, replica = self._job.engine, self._job.position.replica
        tensors = store.collect_tensors(
            engine.blocks, engine.syncs, self._evaluation_weights(), replica
        )
        self._save(self.out / CHECKPOINT_FOLDER, tensors, self.plan.run.checkpoint.keep)
        assert self._progress is not None
        save_s = time.perf_counter() - start
        self._progress.end_save(save_s)
        self._saved_update = self.update
        if self._clock is not None:
            self._clock.note_save(save_s)
        self._write_running_summary()
        self._notify("checkpoint")

    def save_best(self) -> None:
        """Keep the evaluated weights in ``checkpoints/best``, in the place of earlier ones."""
        self._refuse_open_segment("save_best")
        tensors: dict[str, Tensor] = {}
        for weights in () if self._job.position.replica else self._evaluation_weights().values():
            tensors |= {f"model/{name}": tensor for name, tensor in weights.items()}
        self._save(self.out / CHECKPOINT_FOLDER / BEST_FOLDER, tensors, keep=1)

    def _save(self, folder: Path, tensors: dict[str, Tensor], keep: int) -> None:
        """Write tensors, averaged weights and states into a checkpoint; keep `keep` of them."""
        if self.rank == 0 and self._owner is not None:
            ownership.check_owned(self.out, self._owner)
        job, position = self._job, self._job.position
        train_split = self.plan.data.train
        if position.replica == 0 and self._ema is not None:
            for index in job.engine.blocks:
                averages = self._ema.weights(index).items()
                tensors |= {f"ema/{name}": tensor for name, tensor in averages}
        if position.replica == position.stage == 0 and isinstance(train_split, Standardised):
            statistics = train_split.statistics()
            tensors |= {f"statistics/{name}": tensor for name, tensor in statistics.items()}
        state = self._totals.state() | {"tied_names": dict(self.plan.layout.model.tied_names)}
        states = {key: each.state() for key, each in callback_keys(self.callbacks).items()}
        store.save(
            folder,
            f"replica-{position.replica}-stage-{position.stage}",
            tensors,
            self.plan.run.to_table(),
            state | ({"callbacks": states} if states else {}),
            job.groups.control,
            keep,
            self._fingerprint,
        )

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
        return self._make_summary("running")

    def _make_summary(self, status: str, digest: str | None = None) -> dict[str, Any]:
        """Return the contents of `summary.json`, the best evaluation included."""
        best = next((each for each in self.callbacks if isinstance(each, BestCheckpoint)), None)
        kept = None if best is None else best.state() | {"value": best.improvement.best}
        if kept is not None:
            del kept["best"]
        return make_summary(self.plan, self._totals, status, digest) | {
            "stop_reason": self.stop_reason,
            "best": kept,
        }

    def _ema_weights(self) -> EvalWeights:
        """Return the averaged weights, with the buffers and frozen parameters of the model."""
        assert self._ema is not None
        weights = self._evaluation_weights()
        return {index: {**weights[index], **self._ema.weights(index)} for index in weights}

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
            run_folder.write_summary(self.out, self._make_summary("running"))

    def _notify(
        self,
        kind: EventKind,
        update: int | None = None,
        segment: Segment | None = None,
        scheduled: bool = True,
    ) -> None:
        """Call the callbacks."""
        for callback in self.callbacks:
            number = self.update if update is None else update
            callback(self, Event(kind, segment or self._segment, number, scheduled))
