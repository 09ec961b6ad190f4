"""Recorder: passes the records of a run to its trackers; a tracker that fails ends no training.

Invariant: made and called on rank 0 alone. `metrics.jsonl` is the first tracker of every run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from dtrain.errors import ConfigError, one_line
from dtrain.schema import Table
from dtrain.tracking import TRACKERS
from dtrain.tracking.base import RunFacts, Tracker
from dtrain.tracking.metrics_file import MetricsFile
from dtrain.user_code import import_object


@final
class Recorder:
    """The trackers of one start of a run.

    Parameters
    ----------
    trackers : sequence of Tracker
        The trackers beside `metrics.jsonl`.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers: tuple[Tracker, ...] = (MetricsFile(), *trackers)
        self._warned: set[int] = set()

    def start(self, run: Table, facts: RunFacts) -> None:
        """Begin or continue the run in all trackers."""
        self._for_all(lambda tracker: tracker.start(run, facts))

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Pass a record to all trackers."""
        self._for_all(lambda tracker: tracker.record(kind, values))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Pass the summary to all trackers."""
        self._for_all(lambda tracker: tracker.finish(summary))

    def close(self) -> None:
        """Close all trackers; calls after the first have no effect."""
        self._for_all(lambda tracker: tracker.close())
        self.trackers = ()

    def _for_all(self, call: Callable[[Tracker], None]) -> None:
        """Call every tracker; warn of the first exception of each."""
        for number, tracker in enumerate(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # the training matters more
                if number not in self._warned:
                    self._warned.add(number)
                    _warn(
                        f"dtrain: the tracker {type(tracker).__name__} failed; the training "
                        f"continues, and records may be missing there: {one_line(error)}"
                    )


def make_trackers(entries: Sequence[str | Tracker], folder: Path) -> list[Tracker]:
    """Return the trackers of `[log] trackers`.

    Parameters
    ----------
    entries : sequence of str or Tracker
        Names of `TRACKERS`, "module:Class", or objects; names are known to be legal.
    folder : Path
        The run file's folder.

    Raises
    ------
    ConfigError
        A module or a package is missing, or a class is no `Tracker`.
    """
    return [_make_tracker(entry, folder) for entry in entries]


def _make_tracker(entry: str | Tracker, folder: Path) -> Tracker:
    if isinstance(entry, Tracker):
        return entry
    target = TRACKERS.get(entry, entry)
    kind = import_object(target, folder, "tracker")
    tracker = kind()
    if not isinstance(tracker, Tracker):
        raise ConfigError(
            "log.no-tracker",
            f"[log] trackers: '{entry}' is no dtrain.tracking.base.Tracker: derive the class from "
            "it",
        )
    return tracker


def _warn(message: str) -> None:
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)
