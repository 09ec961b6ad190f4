"""Tracker: receives the settings, the records and the summary of a run, on rank 0.

Invariant: no result of a tracker changes a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, final

from dtrain.errors import ConfigError
from dtrain.schema import Table

POSITION_KEYS = ("time_s", "unix_s", "attempt", "update", "epoch")
"""Keys at the head of every record: the time of the run, the clock, and the position."""


@final
@dataclass(frozen=True)
class RunFacts:
    """The run that a tracker receives.

    Attributes
    ----------
    folder : Path
        The run folder; a tracker writes into it.
    name : str
        Name of the run: that of its folder.
    attempt : int
        Number of this start of the run, from 1; a tracker appends from 2 on.
    update : int
        Updates done before this start.
    """

    folder: Path
    name: str
    attempt: int
    update: int


class Tracker(ABC):
    """A receiver of the records of a run. Rank 0 alone makes and calls it.

    An exception of any method but the constructor is a warning, once; the training continues.
    """

    def start(self, run: Table, facts: RunFacts) -> None:  # noqa: B027
        """Begin or continue a run.

        Parameters
        ----------
        run : dict
            The resolved run, as the nested tables of a run file.
        """

    @abstractmethod
    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Receive one record.

        Parameters
        ----------
        kind : str
            "run": a start. "train": a segment. "eval" and "checkpoint": those.
        values : mapping
            Plain values by key, those of `POSITION_KEYS` first. A value may be None, a list or a
            dict; `scalars` returns the numbers in it.
        """

    def finish(self, summary: Mapping[str, Any]) -> None:  # noqa: B027
        """Receive the contents of `summary.json` at the end of a run that does not fail."""

    def close(self) -> None:  # noqa: B027
        """Write what is left and close files; called last, also after a failure."""


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in a record but its position; "loss/0" is the first number of a list and
    "metrics/mae" an entry of a dict."""
    items = ((key, value) for key, value in values.items() if key not in POSITION_KEYS)
    return {name: number for key, value in items for name, number in _numbers(key, value)}


def flat_settings(run: Table, prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, with dotted keys: "optimizer.lr"."""
    flat: dict[str, Any] = {}
    for key, value in run.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def require_package(tracker: str, modules: Sequence[str], package: str) -> ModuleType:
    """Import and return the first of the modules that is installed.

    Parameters
    ----------
    tracker : str
        Name of the tracker, for the message.
    package : str
        The package that `pip` installs.

    Raises
    ------
    ConfigError
        None is installed.
    """
    for name in modules:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ConfigError(
        "log.tracker-package",
        f"[log] trackers: '{tracker}' needs a package that is not installed: type `pip install "
        f"{package}`, or leave the tracker out",
    )


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _numbers(f"{name}/{number}", item)
    elif isinstance(value, int | float):
        yield name, float(value)
