"""EndRequests: signals and the clock ask for a checkpoint or for the end, and all ranks agree."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import final

from dtrain.build import RankJob
from dtrain.comm.communicator import Comm
from dtrain.comm.early_end import EarlyEnd
from dtrain.rank_process import defer_stop_signals, end_at_signals
from dtrain.session.job_limit import JobLimit
from dtrain.session.requests import reason, signal_request, stops
from dtrain.session.run_clock import RunClock


@final
class EndRequests:
    """What the ranks were asked for, and what they have agreed on.

    Attributes
    ----------
    stop_reason : str or None
        Why the run ends before its last update.
    interrupted : bool
        Whether a signal or the time limit of the job ends the run.
    save_requested : bool
        Whether the ranks write a checkpoint at the next possible moment.
    early_end : EarlyEnd or None
        The agreement of all ranks; None before `listen`.
    clock : RunClock or None
        The clock, on rank 0.
    """

    def __init__(self) -> None:
        self.stop_reason: str | None = None
        self.interrupted = False
        self.save_requested = False
        self.early_end: EarlyEnd | None = None
        self.clock: RunClock | None = None
        self._comm: Comm | None = None

    def listen(
        self,
        comm: Comm,
        job: RankJob,
        say: Callable[[str], None],
        limit: JobLimit | None,
        starts_at: int,
    ) -> None:
        """Act on stop signals and on the clock at the next possible update from now on.

        Collective over all ranks.

        Parameters
        ----------
        say : callable
            Prints a line, on rank 0.
        limit : JobLimit or None
            When the job ends.
        starts_at : int
            Updates done before.
        """
        early_end = EarlyEnd(comm.dup("early end"), job.engine.may_end_early)
        if comm.rank == 0:
            self.clock = RunClock(early_end, job.plan, say, limit, starts_at)
            early_end.clock = self.clock.check
        self._comm, self.early_end = job.groups.control, early_end
        defer_stop_signals(self.interrupt, job.plan.run.checkpoint.signals)

    def interrupt(self, signal_number: int = signal.SIGTERM) -> None:
        """Ask for a checkpoint and the end, as a signal does."""
        if self.early_end is not None:
            request = signal_request(signal_number)
            self.early_end.requested = max(self.early_end.requested, request)

    def agree_between_segments(self, begun: int) -> None:
        """Set on all ranks what one of them was asked for. Collective over all ranks.

        Parameters
        ----------
        begun : int
            Updates that count as begun from now on.
        """
        assert self.early_end is not None
        assert self._comm is not None
        rows = self._comm.allgather_object([self.stop_reason, self.early_end.announce(begun)])
        self.stop_reason = next((reason for reason, _ in rows if reason is not None), None)
        self.act_on(self.early_end.settle(max(request for _, request in rows), begun))

    def act_on(self, request: int) -> None:
        """Note what all ranks have agreed to do."""
        assert self.early_end is not None
        if stops(request):
            self.early_end.disable()
        if stops(request) and self.stop_reason is None:
            self.interrupted, self.stop_reason = True, reason(request)
        self.save_requested |= request > 0

    def end(self, update: int) -> None:
        """End the agreement; later signals change nothing. Collective over all ranks."""
        assert self.early_end is not None
        assert self._comm is not None
        is_open = self.early_end.disable()
        if any(self._comm.allgather_object(is_open)):
            self.early_end.settle(1, update)
        self.early_end.close()

    def close(self) -> None:
        """Let signals end the process again; may be called again."""
        if self.early_end is not None:
            end_at_signals()
            self.early_end.close()
