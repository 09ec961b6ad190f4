"""FolderLock: the run folder belongs to this session, from its start to its end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import final

from dtrain.checkpoint import ownership, run_folder
from dtrain.checkpoint.resume import ResumePoint, find_checkpoint, set_damaged_aside
from dtrain.checkpoint.run_folder import BEST_FOLDER, CHECKPOINT_FOLDER
from dtrain.checkpoint.store import remove_partial
from dtrain.comm.agree import all_or_none, broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError, DtrainError


@final
class FolderLock:
    """The lock of a run folder.

    Parameters
    ----------
    comm : Comm
        All ranks.
    out : Path
        The run folder.

    Attributes
    ----------
    owner : Owner or None
        The owner that the folder names; None before `acquire`.
    """

    def __init__(self, comm: Comm, out: Path) -> None:
        self._comm = comm
        self._out = out
        self.owner: ownership.Owner | None = None
        self._heartbeat: ownership.Heartbeat | None = None

    def acquire(self, resume: str, point: ResumePoint) -> int:
        """Lock the folder; return the number of this attempt. Collective over all ranks."""
        comm, out = self._comm, self._out
        attempt: int
        self.owner, attempt = broadcast_object(comm, lambda: _acquire(out, resume, point))
        if comm.rank == 0:
            self._heartbeat = ownership.Heartbeat(out)
        all_or_none(comm, lambda: ownership.check_visible(out, comm.hosts[comm.rank]))
        return attempt

    def check(self) -> None:
        """Refuse to write, on rank 0, if another program has taken the folder over."""
        if self._comm.rank == 0 and self.owner is not None:
            ownership.check_owned(self._out, self.owner)

    def release(self) -> None:
        """Let the next start have the folder; may be called again."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self.owner is not None and self._comm.rank == 0:
            ownership.release(self._out, self.owner)


def _acquire(out: Path, resume: str, point: ResumePoint) -> tuple[ownership.Owner, int]:
    """Lock the run folder; return its owner and the number of this attempt."""
    if resume == "fresh":
        run_folder.set_aside(out)
    owner = ownership.acquire(out)
    try:
        newest = ResumePoint.from_manifest(find_checkpoint(out, resume, dict(point.damaged)))
        if newest.checkpoint != point.checkpoint:
            raise ConfigError(
                "run-folder.changed",
                f"another run has just written into {out}: start this run again",
            )
        set_damaged_aside(out, point)
    except DtrainError:
        ownership.release(out, owner)
        raise
    run_folder.remove_drafts(out)
    for folder in (out / CHECKPOINT_FOLDER, out / CHECKPOINT_FOLDER / BEST_FOLDER):
        with suppress(OSError):  # the next save tries again
            remove_partial(folder)
    attempts = (run_folder.read_summary(out) or {}).get("attempts", 0)
    run_folder.archive(out, run_folder.FLIGHT_FOLDER, attempts)
    return owner, attempts + 1
