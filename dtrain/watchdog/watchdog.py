"""Watchdog: two threads of a rank that end a hanging run.

Invariant: neither thread communicates through MPI or changes what is trained. The decision is that
of an `Observer`, from the positions of all ranks. One rank reports it and ends the job; the others
write their flight records and end by themselves if the job does not.

    thread "dtrain-pulse"      samples the last event of this rank; touches no file. If the run
                               folder does not answer either, it ends this rank alone
    thread "dtrain-watch"      looks for an alarm, publishes the position, decides
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import final

from dtrain.comm.flight_recorder import FlightRecorder, format_ranks, print_error
from dtrain.comm.stacks import user_line
from dtrain.errors import DtrainError, HangError
from dtrain.watchdog.hang_text import Ranks, culprit_stack, hang_error, slow_note
from dtrain.watchdog.limits import Limits, Pulse
from dtrain.watchdog.observer import Hang, Observer
from dtrain.watchdog.positions import Position, PositionFiles
from dtrain.watchdog.process_state import silent_states

ALARM_SHARE = 0.5
"""Share of a limit after which a rank raises the alarm."""


SILENT_SHARE = 0.25
"""Share of a limit after which a rank without a new position is silent."""


SUBSTITUTE_SHARE = 1.25
"""Share of a limit after which ranks decide that have not raised the alarm."""


ALONE_SHARE = 1.5
"""Share of a limit after which a rank ends without an answer of the run folder."""


RECORD_S = 5.0
"""Seconds that the other ranks have to write their records."""


END_S = 10.0
"""Seconds after a verdict after which a rank ends by itself."""


MIN_POLL_S = 0.05
"""Seconds between two readings of the positions after a verdict."""


MAX_NOTES = 5
"""Notes of a rank in one run."""


@final
class Watchdog:
    """The watchdog of one rank.

    Parameters
    ----------
    flight : FlightRecorder
        The events, waits and section of this rank.
    names : sequence of str
        "rank 3 of 4 on n017" of every rank.
    hosts : sequence of str
        The host of every rank.
    limits : Limits
        The limits of the sections.
    folder : Path
        A folder that all ranks see.
    on_hang : callable
        Receives the error on the one rank that reports, and ends the job.
    end_process : callable
        Ends this process with an exit code.

    Attributes
    ----------
    folder : Path
        The folder of the files now.
    thread_id : int
        The thread whose stack is shown.
    """

    def __init__(
        self,
        flight: FlightRecorder,
        names: Sequence[str],
        hosts: Sequence[str],
        limits: Limits,
        folder: Path,
        on_hang: Callable[[DtrainError], None],
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self.folder = folder
        self._run_folder: Path | None = None
        self.thread_id = threading.get_ident()
        self._flight = flight
        self._names = names
        self._hosts = hosts
        self._limits = limits
        self._on_hang = on_hang
        self._end_process = end_process
        self._pulse = Pulse(limits, limits.tick_s)
        self._observer = Observer(flight.rank, flight.size)
        self._stopped = threading.Event()
        self._answered_s = time.perf_counter()
        self._was_stopped = False
        self._beat = self._notes = 0
        self._raised = self._noted = self._published = False

    def start(self) -> None:
        """Start the threads, if any section has a limit."""
        if self._limits.enabled:
            for name, function in (("pulse", self._sample), ("watch", self._watch)):
                threading.Thread(target=function, name=f"dtrain-{name}", daemon=True).start()

    def stop(self) -> None:
        """End the threads soon; neither acts from now on."""
        self._stopped.set()

    def use_run_folder(self, folder: Path, flight_folder: Path) -> None:
        """Write into the run folder from now on: it is locked."""
        self._run_folder, self.folder = folder, flight_folder

    # ---- the pulse

    def _sample(self) -> None:
        """Sample this rank until the watchdog is stopped."""
        flight = self._flight
        while not self._stopped.wait(self._limits.tick_s):
            now = time.perf_counter()
            if self._pulse.sample(now, flight.last_event_s(), flight.section):
                self._answered_s, self._was_stopped = now, True
            limit_s = self._limits.of(flight.section)
            if (
                self._pulse.still_s(now) > ALONE_SHARE * limit_s
                and now - self._answered_s > SILENT_SHARE * limit_s
            ):
                self._end_alone(now, limit_s)

    def _end_alone(self, now: float, limit_s: float) -> None:
        """End this rank: the run folder does not answer, so nothing is known about the others."""
        if self._flight.open_waits:  # let a rank report that waits for no other
            self._stopped.wait(END_S / 2)
        if self._stopped.is_set():
            return
        error = HangError(
            "hang.no-run-folder",
            f"{self._names[self._flight.rank]} has made no progress for "
            f"{self._pulse.still_s(now):.0f} s in section '{self._flight.section}' (limit "
            f"{limit_s:g} s), and the run folder {self.folder} does not answer: check its file "
            "system; start the same command again to resume from the last checkpoint",
        )
        print_error(f"dtrain: {error.text_with_key()}")
        self._end_process(error.code)

    # ---- the watch

    def _watch(self) -> None:
        """Look for alarms and verdicts until the watchdog is stopped."""
        files = PositionFiles(self.folder, self._flight.rank)
        while not self._stopped.wait(self._limits.tick_s):
            if files.folder != self.folder:
                self._withdraw(files)
                files = PositionFiles(self.folder, self._flight.rank)
            with suppress(Exception):  # a file system may come back; else this rank ends alone
                self._look(files)
                self._answered_s = time.perf_counter()
        with suppress(OSError):
            self._withdraw(files)

    def _look(self, files: PositionFiles) -> None:
        """Act on the state of this rank and on the alarm of any."""
        if files.has_verdict():
            self._obey(files)
            return
        now, limit_s = time.perf_counter(), self._limits.of(self._flight.section)
        if not self._pulse.is_current(now):
            return
        if self._was_stopped:
            self._was_stopped = False
            self._observer.reset()
        still_s = self._pulse.still_s(now)
        is_suspicious = still_s > ALARM_SHARE * limit_s
        if is_suspicious and not self._raised:
            self._raised = files.raise_alarm()
        elif self._raised and not is_suspicious:
            files.lift_alarm()
            self._raised = False
        if not files.has_alarm():
            self._withdraw(files)
            return
        own = self._publish(files, now)
        if self._raised or still_s > SUBSTITUTE_SHARE * limit_s:
            self._observer.observe(now, files.read())
            self._judge(files, own, now, limit_s)

    def _judge(self, files: PositionFiles, own: Position, now: float, limit_s: float) -> None:
        """Note who is slow, and report a hang."""
        silent_s = SILENT_SHARE * limit_s
        has_news = self._observer.watched_s(now) > 3 * self._limits.tick_s
        if self._raised and has_news and not self._noted and self._notes < MAX_NOTES:
            self._noted, self._notes = True, self._notes + 1
            suspects = self._observer.suspects(now, silent_s)
            print_error(slow_note(suspects, own, self._ranks(suspects)))
        hang = self._observer.hang(now, silent_s)
        if hang is not None and files.claim_verdict():
            self._report(files, hang, own)

    def _report(self, files: PositionFiles, hang: Hang, own: Position) -> None:
        """Let all ranks write their records, and end the job with the error."""
        self._record(files)
        answering = set(hang.positions) - hang.silent
        deadline = time.perf_counter() + RECORD_S + 2 * self._limits.tick_s
        while time.perf_counter() < deadline and not self._stopped.is_set():
            recorded = {position.rank for position in files.read() if position.recorded}
            if recorded >= answering:
                break
            time.sleep(MIN_POLL_S)
        folder = self._flight.folder or self.folder
        if stack := culprit_stack(hang, folder):
            print_error(stack)
        if not self._stopped.is_set():
            self._on_hang(hang_error(hang, own, folder, self._ranks(hang)))

    def _ranks(self, hang: Hang) -> Ranks:
        """Return names and states of the ranks."""
        folder = self._run_folder
        states = silent_states(hang.silent, self._hosts, self._flight.rank, folder)
        return Ranks(self._names, states)

    def _obey(self, files: PositionFiles) -> None:
        """Write the record of this rank; end it if the job does not end."""
        self._record(files)
        if not self._stopped.wait(END_S):
            self._end_process(HangError.code)

    def _record(self, files: PositionFiles) -> None:
        """Write the flight record, which no later one replaces, and say so."""
        if self._flight.folder is None:
            self._flight.folder = self.folder  # before the run folder is locked
        self._flight.dump("the run hangs", self._frame(), is_final=True)
        self._publish(files, time.perf_counter(), recorded=True)

    def _withdraw(self, files: PositionFiles) -> None:
        """Delete what this rank has written."""
        if self._raised:
            files.lift_alarm()
        if self._published:
            files.withdraw()
        self._observer.reset()
        self._raised = self._noted = self._published = False

    def _publish(self, files: PositionFiles, now: float, recorded: bool = False) -> Position:
        """Write the position of this rank and return it."""
        flight, limit_s = self._flight, self._limits.of(self._flight.section)
        action = flight.last_action()
        waits = flight.open_waits[-1:]
        _, description, peers = waits[0] if waits else (0.0, None, ())
        self._beat += 1
        position = Position(
            rank=flight.rank,
            process=os.getpid(),
            beat=self._beat,
            event_s=flight.last_event_s(),
            still_s=round(self._pulse.still_s(now), 3),
            limit_s=None if limit_s == float("inf") else round(limit_s, 3),
            section=flight.section,
            update=str(action[2]) if len(action) > 2 else None,
            action=str(action[0]) if action else None,
            what=description,
            peers=format_ranks(peers),
            place=None if waits else user_line(self._frame()),
        )
        if recorded:
            position = replace(position, recorded=True)
        files.publish(position)
        self._published = True
        return position

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self.thread_id)
