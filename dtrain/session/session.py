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
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from dtrain.callbacks import BestCheckpoint, Callback, Event, EventKind
from dtrain.checkpoint import run_folder
from dtrain.comm.agree import all_or_none
from dtrain.comm.communicator import Comm
from dtrain.comm.flight_recorder import print_error
from dtrain.config.out_folder import fill_keys
from dtrain.config.run import RunConfig
from dtrain.errors import RankLostError
from dtrain.monitoring.metric_values import higher_is_better, metric_values
from dtrain.monitoring.summary import make_summary
from dtrain.paths import expand_path, expand_text
from dtrain.planning.plan import Plan
from dtrain.rank_process import init
from dtrain.run import Run
from dtrain.schedules.segments import Segment
from dtrain.session.checkpoint_writer import CheckpointWriter
from dtrain.session.end_requests import EndRequests
from dtrain.session.evaluator import Evaluator
from dtrain.session.failure import report_failure
from dtrain.session.folder_lock import FolderLock
from dtrain.session.hang_watch import HangWatch
from dtrain.session.opening import OpenRun, open_run
from dtrain.session.segment_training import SegmentTraining
from dtrain.user_code import refuse_during_import

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
        The ranks that train; default: those of `dtrain.init`, or a part of them, as
        ``dtrain.init().split(color)`` returns it.

    Attributes
    ----------
    callbacks : tuple of callable
        Those of the run's keys, and the given ones.
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
        self.out = all_or_none(self.comm, lambda: fill_keys(expand_path(folder, "out"), config))
        self._given = config if exact_mesh else config.fit_stages(self.comm.size)
        self._resume = all_or_none(self.comm, lambda: expand_text(resume, "resume"))
        self._lock = FolderLock(self.comm, self.out)
        self._requests = EndRequests()
        self._resources = ExitStack()
        self._saves = ExitStack()
        self._opened: OpenRun | None = None
        self._summary: dict[str, Any] | None = None
        self._has_trained = False

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
        comm, requests = self.comm, self._requests
        watch = HangWatch(comm, self._given.timeouts, self.out, self._lock)
        self._resources.callback(watch.close)
        self._opened = run = open_run(
            self._given,
            self.out,
            self._resume,
            self.callbacks,
            comm,
            self._lock,
            watch,
            self._resources,
        )
        self.callbacks = run.callbacks
        _RUNS[self.out.resolve()] = run.job.plan.run
        self._evaluator = Evaluator(run.job, run.ema, comm)
        self._checkpoints = CheckpointWriter(run, self._lock, self._evaluator)
        self._saves.callback(self._checkpoints.discard)
        self._training = SegmentTraining(
            run, requests, self._checkpoints, self._save_if_requested, self._evaluator.forget
        )
        self._resources.callback(requests.close)
        requests.listen(comm, run.job, run.monitor.note, run.limit, run.totals.update)
        run.show_start()
        self._notify("start")
        comm.flight.enter("collective")

    @property
    def _run(self) -> OpenRun:
        assert self._opened is not None, "the session is not open: use it in a `with` statement"
        return self._opened

    def _complete(self) -> None:
        """Reach the end of the segment, then write the summary with the model's digest."""
        if self._training.segment is not None:
            self.finish(self._training.segment)
        with self.comm.flight.in_section("checkpoint"):
            self._checkpoints.finish()
        self._requests.end(self.update)
        self._notify("end")
        self._run.monitor.finish(self._finished_summary())
        with self.comm.without_counting():
            self.comm.allgather_object(None)  # the summary is there before a rank reads it

    def _finished_summary(self) -> dict[str, Any]:
        totals, digest = self._run.totals, None
        is_finished = totals.update >= self.plan.training_length.total_updates
        is_finished |= self.stop_reason is not None
        if self.interrupted:  # the rest of the time is short
            is_finished = False
        else:
            if is_finished and totals.tested != totals.update:  # resumed from one not tested
                self.evaluate(scheduled=False)
            digest = self.digest()
        totals.tick()
        self._summary = self._make_summary("finished" if is_finished else "stopped", digest)
        if self.rank == 0:
            run_folder.write_summary(self.out, self._summary)
        return self._summary

    def _close(self, error: BaseException | None) -> None:
        """Record a failure, release the folder, and leave the terminal as it was."""
        with self._resources:
            self._saves.close()
            if error is not None:
                report_failure(error, self.comm, self.out, self._lock.owner)
            if isinstance(error, SystemExit) and self.comm.size > 1:  # the other ranks go on
                print_error("".join(traceback.format_exception(error)).rstrip())
                print_error(f"dtrain: rank {self.rank} left its session by sys.exit")
                self.comm.abort(RankLostError.code)

    # ---- position

    @property
    def rank(self) -> int:
        """This rank."""
        return self.comm.rank

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self._run.job.plan

    @property
    def update(self) -> int:
        """Updates done at the end of the last finished segment, over all attempts."""
        return self._run.totals.update

    @property
    def saved_update(self) -> int:
        """Updates that the newest checkpoint of the run holds, or the one that is being written."""
        return self._checkpoints.saved_update

    @property
    def stop_reason(self) -> str | None:
        """Why the run ends before its last update; the same on all ranks once `segments` has
        ended."""
        return self._requests.stop_reason

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped by a signal or by the time limit of the job: `segments` saves
        and ends. The same on all ranks after `finish`."""
        return self._requests.interrupted

    @property
    def evaluation_pending(self) -> bool:
        """Whether the run was stopped at the end of a segment, before its evaluation."""
        return self._run.totals.evaluation_pending

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.update // self.plan.training_length.updates_per_epoch

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per epoch, over all attempts; the same on all ranks."""
        return self._run.totals.history

    def metric(self, name: str) -> float | None:
        """Return a metric of the latest evaluation, "test_loss" for example; None where it is not
        finite or not measured yet. Not collective; the same on all ranks."""
        return metric_values(self._run.totals).get(name)

    def higher_is_better(self, name: str) -> bool:
        """Return whether a larger value of a metric is better."""
        return higher_is_better(name, self.plan.layout.task)

    def set_lr_scale(self, scale: float) -> None:
        """Multiply the learning rates of the updates of later segments. All ranks call it."""
        self._run.job.engine.update_step.lr_scale = scale

    def losses(self) -> dict[int, float]:
        """Return the mean loss so far in this segment of each block of this rank, by block."""
        return self._run.job.engine.metric_sums.mean_losses()

    def stop(self, reason: str) -> None:
        """Let `segments` end after this one. All ranks have to call it."""
        self._requests.stop_reason = reason

    # ---- training

    def interrupt(self, signal_number: int = signal.SIGTERM) -> None:
        """Let the run save and end at the next possible update, as after a signal.

        One rank may call it, or several; a signal handler, too.
        """
        self._requests.interrupt(signal_number)

    def segments(self) -> Iterator[Segment]:
        """Yield the segments that are left. The ranks agree before each one whether to stop.

        A run that was stopped early saves a checkpoint and yields no further segment.
        """
        for segment in self.plan.training_length.segments(self.update):
            self._requests.agree_between_segments(segment.start + 1)
            self._save_if_requested()
            if self.stop_reason is not None:
                return
            yield segment
        self._save_if_requested()

    def _save_if_requested(self) -> None:
        if self._requests.save_requested and self.saved_update != self.update:
            self.save()
        self._requests.save_requested = False

    def updates(self, segment: Segment) -> Iterator[int]:
        """Train the updates of a segment; yield the number of each, from 0 in the run.

        A run that was stopped early yields fewer.
        """
        clock, monitor = self._requests.clock, self._run.monitor
        self.comm.flight.enter("update" if self._has_trained else "first-update")
        for update in self._training.updates(segment):
            if not self._has_trained:
                self._has_trained = True
                self.comm.flight.enter("update")
            monitor.show(update)
            if clock is not None:
                clock.note_update(update)
            self._checkpoints.poll()
            if self.callbacks:
                self._notify("update", update + 1)
            yield update

    def finish(self, segment: Segment) -> None:
        """End a segment: syncs settle, and the records of all ranks are added up."""
        finished = self._training.finish(segment)
        self.comm.flight.enter("collective")
        if finished is None:  # it ended early
            self._write_running_summary()
            return
        segment, request = finished
        self._run.monitor.end_segment()
        self._write_running_summary()
        self._notify("segment", segment=segment)
        self._requests.act_on(request)
        self._run.totals.evaluation_pending = self.interrupted

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
        self._training.refuse_open("evaluate")
        totals, start = self._run.totals, time.perf_counter()
        totals.evaluation_pending = False
        with self.comm.flight.in_section("evaluation"):
            totals.test, totals.evaluations = self._evaluator.test()
        totals.tested = totals.update
        totals.tick()
        totals.add_history_test()
        eval_s = time.perf_counter() - start
        self._run.monitor.end_evaluation(eval_s)
        if self._requests.clock is not None:
            self._requests.clock.note_evaluation(eval_s)
        self._write_running_summary()
        self._notify("evaluation", scheduled=scheduled)
        values = metric_values(totals)
        return {name: values[name] for name in ("loss", *totals.test["metrics"])}

    def save(self) -> None:
        """Write a checkpoint, from which the next start resumes."""
        self._training.refuse_open("save")
        self._run.totals.tick()
        start = time.perf_counter()
        with self.comm.flight.in_section("checkpoint"):
            self._checkpoints.save(at_once=self.interrupted)
        save_s = time.perf_counter() - start
        self._run.monitor.end_save(save_s, self._checkpoints.is_asynchronous)
        if self._requests.clock is not None:
            write_s = self._checkpoints.write_s if self._checkpoints.is_asynchronous else save_s
            self._requests.clock.note_save(write_s)
        self._write_running_summary()
        self._notify("checkpoint")

    def save_best(self) -> None:
        """Keep the evaluated weights in ``checkpoints/best``, in the place of earlier ones."""
        self._training.refuse_open("save_best")
        with self.comm.flight.in_section("checkpoint"):
            self._checkpoints.save_best()

    def digest(self) -> str:
        """Return the SHA-256 of the evaluated model."""
        self._training.refuse_open("digest")
        return self._evaluator.digest()

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
        return make_summary(self.plan, self._run.totals, status, digest) | {
            "stop_reason": self.stop_reason,
            "best": kept,
        }

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
            callback(self, Event(kind, segment or self._training.segment, number, scheduled))
