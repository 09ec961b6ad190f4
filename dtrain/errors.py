"""Refusals: errors in what was asked, told in one message without a traceback.

Invariant: whatever a user can get wrong in a run file, a mesh or a data set ends in a `Refusal`;
every other exception is a fault of the program (or of user code) and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable

USAGE, DATA, NUMERIC = 2, 3, 4


class Refusal(Exception):
    """What was asked cannot be done; the message says what was found and what to do.

    Parameters
    ----------
    message : str
        What was asked; what was found, with numbers; what to do.
    code : int
        Exit code of the program: 2 usage, run file or mesh; 3 data; 4 numeric failure.
    agreed : bool
        Whether every rank raises it; else the one that does has to end the others.
    """

    def __init__(self, message: str, code: int = USAGE, agreed: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.agreed = agreed

    def at(self, place: str) -> None:
        """Add to the message where it happened."""
        self.message = f"{self.message} {place}"
        self.args = (self.message,)


class Stopped(BaseException):
    """Somebody asked this process to end, by a signal; no user code takes it for an error.

    Attributes
    ----------
    code : int
        Exit code of the program, as a shell would have it.
    quiet : bool
        Whether another rank has said why the job ends.
    """

    def __init__(self, number: int, quiet: bool = False) -> None:
        asked = f"stopped by {signal.Signals(number).name}"
        causes = "a time limit, scancel, or another rank that died: see the job's log"
        super().__init__(f"{asked} ({causes})" if number == signal.SIGTERM else asked)
        self.code = 128 + number
        self.quiet = quiet


def sign(error: BaseException, place: str) -> None:
    """Add to an error where it was raised."""
    if isinstance(error, Refusal):
        error.at(place)
    else:
        error.add_note(place)


def words(error: BaseException) -> str:
    """Return an error in one line: its type, its message, and where it was raised."""
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


def unknown(what: str, name: str, legal: Iterable[str]) -> Refusal:
    """Return the refusal of an unknown name: it lists the legal ones and the closest match."""
    names = sorted(legal)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return Refusal(f"unknown {what} '{name}': {hint}legal are {', '.join(names) or 'none'}")
