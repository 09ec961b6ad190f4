"""Positions: files in which ranks say where they are while one of them has an alarm.

Invariant: works without MPI, torch and clocks that agree. A run without a long pause writes no
file: each rank only looks whether the file `alarm` exists.

::

    flight/alarm                  a rank has been without an event for half of its limit
    flight/rank-00003.position    one JSON object per rank, written at every look
    flight/verdict                created by the first rank that detects a hang
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from dtrain.monitoring.wait_graph import Wait


@final
@dataclass(frozen=True)
class Position:
    """Where a rank is.

    Attributes
    ----------
    rank, process : int
        World rank, and process number.
    beat : int
        Number of this position.
    event_s : float
        Time of the last event by the clock of the rank; compared with itself alone.
    still_s, limit_s : float, float or None
        Seconds without an event, and their limit, if there is one.
    section, update, action : str or None
        Section of the run, and the last action.
    what, peers : str or None, str
        The innermost wait, and the ranks that it waits for; None: the rank is in no wait.
    place : str or None
        Line of the program, where it is in no wait.
    recorded : bool
        Whether the rank has written its flight record after the verdict.
    """

    rank: int
    process: int
    beat: int
    event_s: float
    still_s: float
    limit_s: float | None
    section: str | None
    update: str | None
    action: str | None
    what: str | None
    peers: str
    place: str | None
    recorded: bool = False

    @property
    def wait(self) -> Wait | None:
        """The innermost wait; None where the rank waits for no other."""
        return None if self.what is None else Wait(self.what, self.peers)


@final
class PositionFiles:
    """The files of one rank and of all others.

    Parameters
    ----------
    folder : Path
        A folder that all ranks see; made when it is needed.
    rank : int
        This rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._alarm = folder / "alarm"
        self._verdict = folder / "verdict"
        self._own = folder / f"rank-{rank:05d}.position"
        for path in (self._alarm, self._verdict):  # of an earlier run with these names
            self._unlink(path)

    def raise_alarm(self) -> bool:
        """Create the alarm; return whether this rank did it."""
        return self._create(self._alarm)

    def lift_alarm(self) -> None:
        """Delete the alarm."""
        self._unlink(self._alarm)

    def has_alarm(self) -> bool:
        """Return whether a rank has an alarm."""
        return self._alarm.exists()

    def claim_verdict(self) -> bool:
        """Create the verdict; return whether this rank did it."""
        return self._create(self._verdict)

    def has_verdict(self) -> bool:
        """Return whether a rank has detected a hang."""
        return self._verdict.exists()

    def publish(self, position: Position) -> None:
        """Write the position of this rank."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self._own.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(position)), encoding="utf-8")
        draft.replace(self._own)

    def read(self) -> Iterator[Position]:
        """Yield the positions of all ranks that have one."""
        for path in self.folder.glob("rank-*.position"):
            with suppress(OSError, ValueError, TypeError):
                yield Position(**json.loads(path.read_text(encoding="utf-8")))

    def withdraw(self) -> None:
        """Delete the position of this rank."""
        self._unlink(self._own)

    def _create(self, path: Path) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    @staticmethod
    def _unlink(path: Path) -> None:
        with suppress(OSError):
            path.unlink()
