"""Threads that write and delete files while the run trains."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar, final

from dtrain.checkpoint import files
from dtrain.errors import CheckpointError

T = TypeVar("T")


NICENESS = 10
"""Of the threads that write: training has the cores first."""


DISCARD_S = 5.0
"""Seconds that a run that fails waits for the end of a write; the disk may not answer."""


@final
class BackgroundWork(threading.Thread, Generic[T]):
    """Work in a thread of low priority, which keeps its result or its error."""

    def __init__(self, name: str, work: Callable[[], T]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Do the work."""
        _lower_priority()
        try:
            self._results.append(self._work())
        except BaseException as error:  # raised by `result`
            self._error = error

    def result(self) -> T:
        """Wait for the end of the work; return its result or raise its error."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._results[0]


@final
class BackgroundRemoval:
    """Deletes folders in a thread: the memory and the blocks of a large file are not freed at once.

    All methods are local.
    """

    def __init__(self) -> None:
        self._work: BackgroundWork[None] | None = None

    def start(self, folders: Sequence[Path]) -> None:
        """Begin to delete folders; errors as `finish`."""
        self.finish()

        def delete() -> None:
            for folder in folders:
                files.delete_folder(folder)

        if folders:
            self._work = BackgroundWork("dtrain-removal", delete)

    def finish(self) -> None:
        """Wait until all is deleted.

        Raises
        ------
        CheckpointError
            The disk refuses.
        """
        work, self._work = self._work, None
        try:
            if work is not None:
                work.result()
        except OSError as error:
            raise CheckpointError(
                "checkpoint.write-failed",
                f"cannot delete an old checkpoint: {error}; the newest one is complete: start the "
                "same command again",
            ) from error

    def discard(self) -> None:
        """Wait a little; the next start deletes what is left."""
        if self._work is not None:
            self._work.join(DISCARD_S)


def _lower_priority() -> None:
    """Let this thread run when others leave a core free; on Linux a thread has its own priority."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
