"""Train one run, from a checked run file to its summary: the loop over a session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.callbacks import Callback
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.errors import Interrupted
from dtrain.schedules.segments import Segment
from dtrain.session.session import Session


def train(
    run: RunConfig,
    comm: Comm,
    out: Path,
    resume: str = "auto",
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train `run` into the folder `out`; return the summary. Collective over `comm`.

    Parameters
    ----------
    resume, callbacks
        As in `Session`.

    Raises
    ------
    Interrupted
        On all ranks, with code 75, once a run that was stopped early has saved.
    DtrainError
        Before training begins on all ranks. Later (a loss that is not finite, for example) on the
        rank that found it: then the caller has to end the others.
    """
    session = Session(run, out, resume=resume, callbacks=callbacks, exact_mesh=True, comm=comm)
    train_session(session)
    return session.summary()


def train_session(session: Session) -> None:
    """Train until the run ends, with evaluations and checkpoints when the run has them.

    Raises
    ------
    Interrupted
        On all ranks, with code 75, once a run that was stopped early has saved.
    """
    with session:
        run = session.plan.run
        if session.evaluation_pending:  # the last attempt was stopped before it
            _evaluate_if_due(session, session.plan.training_length.update_before(session.update))
        for segment in session.segments():
            for _ in session.updates(segment):
                pass
            session.finish(segment)
            if session.interrupted:
                continue  # it saves and ends
            _evaluate_if_due(session, segment)
            if checkpoint_is_due(run, segment):
                session.save()
        if session.update > session.saved_update:  # a callback has stopped the run
            session.save()
    if session.interrupted:
        raise Interrupted.saved(session.stop_reason or "", session.update)


def _evaluate_if_due(session: Session, segment: Segment) -> None:
    """Evaluate after a segment, if the run has it then or ends."""
    if evaluation_is_due(session.plan.run, segment):
        session.evaluate()
    elif segment.ends_run:
        session.evaluate(scheduled=False)


def evaluation_is_due(run: RunConfig, segment: Segment) -> bool:
    """Return whether `[evaluate]` has the model tested at the end of a segment."""
    if run.evaluate.every_updates:
        return segment.stop % run.evaluate.every_updates == 0
    return segment.ends_epoch and (segment.epoch + 1) % run.evaluate.every == 0


def checkpoint_is_due(run: RunConfig, segment: Segment) -> bool:
    """Return whether a checkpoint is saved at the end of a segment."""
    interval, end = run.checkpoint.every, segment.offset + segment.stop - segment.start
    is_at_interval = interval > 0 and end // interval > segment.offset // interval
    return is_at_interval or segment.ends_epoch or segment.ends_run
