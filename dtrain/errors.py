"""Exceptions with an exit code and a stable key; the command line prints them without a traceback.

Invariant: every mistake that a user can make in a run file, a mesh or a data set raises a
`DtrainError`. Any other exception is a fault of the program or of user code and keeps its
traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Sequence


class DtrainError(Exception):
    """Base class of the errors that dtrain raises on purpose.

    Parameters
    ----------
    key : str
        Stable name of the mistake, "area.what" in kebab-case, for programs and tests.
    message : str
        The text for people: first the wrong value, then the fix.
    on_all_ranks : bool
        Whether every rank raises it. Otherwise the rank that raises it has to end the others.

    Attributes
    ----------
    code : int
        Exit code of the program.
    """

    code: int = 1

    def __init__(self, key: str, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.key = key
        self.message = message
        self.on_all_ranks = on_all_ranks

    def text_with_key(self) -> str:
        """Return the text of the command line: the message, and the key in brackets at its end.

        The key of a message of several lines stands in its own line, so that the last line of the
        message, often a command, can be copied.
        """
        separator = "\n" if "\n" in self.message else " "
        return f"{self.message}{separator}[{self.key}]"

    def with_prefix(self, prefix: str) -> DtrainError:
        """Return a copy of the error whose message begins with `prefix` and a colon."""
        return type(self)(self.key, f"{prefix}: {self.message}", on_all_ranks=self.on_all_ranks)

    def to_record(self) -> tuple[str, str, str]:
        """Return class name, key and message, which JSON can hold."""
        kind = next(kind for kind in type(self).__mro__ if kind.__name__ in _kinds())
        return kind.__name__, self.key, self.message

    @staticmethod
    def from_record(record: Sequence[str]) -> DtrainError:
        """Return the error of a record, as one that every rank raises."""
        name, key, message = record
        return _kinds()[name](key, message, on_all_ranks=True)

    def at(self, location: str) -> None:
        """Append the place of the error to its message."""
        self.message = f"{self.message} {location}"
        self.args = (self.message,)


class ConfigError(DtrainError):
    """A command, a run file, a mesh, a partition or a strategy is invalid."""

    code = 2


class DataError(DtrainError):
    """A data set is missing, damaged or unsuitable."""

    code = 3


class NumericalError(DtrainError):
    """A loss or a weight is NaN or infinite, or replicas differ that must be equal."""

    code = 4


class CheckpointError(DtrainError):
    """A checkpoint is damaged or incomplete."""

    code = 5


class HangError(DtrainError):
    """Ranks wait for each other, or a wait exceeds its time limit."""

    code = 6


class RankLostError(DtrainError):
    """Another rank of the run has ended."""

    code = 7


def _kinds() -> dict[str, type[DtrainError]]:
    """Return the classes of this module by name; ranks exchange no others."""
    kinds: list[type[DtrainError]] = [DtrainError, *DtrainError.__subclasses__()]
    return {kind.__name__: kind for kind in kinds if kind.__module__ == __name__}


SAVED_CODE = 75
"""Exit code of a run that was stopped early and has saved: EX_TEMPFAIL, try again later."""


class Interrupted(BaseException):
    """The run was stopped early: by a signal before training, or by a signal or the time limit of
    the job in training; then it has saved a checkpoint.

    It derives from `BaseException`, as `KeyboardInterrupt` does, so that an `except Exception` in
    user code does not swallow it.

    Attributes
    ----------
    code : int
        Exit code of the program: 75 if a checkpoint was saved, else 128 + the signal's number.
    key : str
        "interrupted.sigterm" and the like; "interrupted.saved".
    quiet : bool
        Whether another rank prints the reason.
    """

    def __init__(self, reason: str, code: int, key: str, quiet: bool = False) -> None:
        super().__init__(reason)
        self.code = code
        self.key = key
        self.quiet = quiet

    @classmethod
    def by_signal(cls, signal_number: int, quiet: bool = False) -> Interrupted:
        """Return the exception for a signal that ends this process at once."""
        name = signal.Signals(signal_number).name
        reason = f"stopped by {name}"
        if signal_number == signal.SIGTERM:
            reason += " (a time limit, scancel, or another rank that died: see the job's log)"
        return cls(reason, 128 + signal_number, f"interrupted.{name.lower()}", quiet)

    @classmethod
    def saved(cls, reason: str, update: int) -> Interrupted:
        """Return the exception that all ranks raise once the run has saved."""
        return cls(f"{reason}, saved at update {update}", SAVED_CODE, "interrupted.saved", True)

    @property
    def on_all_ranks(self) -> bool:
        """Whether every rank raises it, with nothing left to do."""
        return self.code == SAVED_CODE


def add_location(error: BaseException, location: str) -> None:
    """Append the place of an error to it."""
    if isinstance(error, DtrainError):
        error.at(location)
    else:
        error.add_note(location)


def one_line(error: BaseException) -> str:
    """Return an error in one line: type, message and place."""
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


def unknown_name(
    kind: str, name: str, legal_names: Iterable[str], *, key: str | None = None
) -> ConfigError:
    """Return the error for an unknown name, with the legal names and the closest match.

    Without a `key` of its own its key is "<kind>.unknown", with hyphens for spaces.
    """
    names = sorted(legal_names)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return ConfigError(
        key or f"{kind.replace(' ', '-')}.unknown",
        f"unknown {kind} '{name}': {hint}legal are {', '.join(names) or 'none'}",
    )
