"""Asynchronous checkpoints: a copy of the tensors in memory, written behind the training.

Invariant: rank 0 commits a checkpoint once it knows the hash of every shard, all of which are
synced: so it is visible only when complete, as in `store.py`. One save is pending at most. Messages
are sent by the main threads alone, and none of them is waited for while the run trains.

::

    all ranks     copy of the tensors, between two updates
    writer        shard, fsync                                a thread of each rank
    other ranks   bytes and hash of the shard --> rank 0      after the update in which it ended
    committer     manifest, rename, removal of old            a thread of rank 0
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from dtrain.checkpoint.background_work import DISCARD_S, BackgroundWork
from dtrain.checkpoint.shard import ShardImage
from dtrain.checkpoint.shard_file import HASH_BYTES, SHARD_HASH
from dtrain.checkpoint.store import NewCheckpoint
from dtrain.comm.backends.base import PointToPointRequest
from dtrain.comm.communicator import Comm

ROW = struct.Struct(f"<Q{HASH_BYTES}s")
"""Bytes and hash of a shard, as ranks send them."""


ROW_TAG = 0


class SaveDiscarded(Exception):
    """The writer ends, since the run has failed."""


@final
class AsyncSaver:
    """The asynchronous checkpoints of one rank.

    Parameters
    ----------
    comm : Comm
        All ranks of the run.
    check_owner : callable
        Called before a commit; it raises an error if the run folder belongs to another run.

    Attributes
    ----------
    write_s : float or None
        Seconds from the copy to the commit of the last complete save; None before one.
    """

    def __init__(self, comm: Comm, check_owner: Callable[[], None]) -> None:
        self._comm = comm.dup("checkpoints")
        self._check_owner = check_owner
        self._image = ShardImage()
        self._pending: PendingSave | None = None
        self._unconfirmed = False
        self.write_s: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the copies that this rank keeps."""
        return self._image.nbytes

    @property
    def is_idle(self) -> bool:
        """Whether nothing is pending on this rank; on rank 0, whether all is committed."""
        return self._pending is None

    def begin(
        self,
        checkpoint: NewCheckpoint,
        shard: str,
        tensors: Mapping[str, Tensor],
        content: Mapping[str, Any],
        keep: int,
    ) -> None:
        """Copy the tensors and begin to write them; first wait for the save before.

        Collective over all ranks. Parameters are those of `store.save`; `content` is the manifest
        without its shards, that of rank 0 counts.

        Raises
        ------
        CheckpointError
            On a rank on which the save before has failed.
        """
        self.finish()
        if tensors:
            self._image.fill(tensors)

        def write(check: Callable[[], None]) -> dict[str, Any] | None:
            return checkpoint.write_image(shard, self._image, check) if tensors else None

        name = (f"{shard}.h5", list(tensors)) if tensors else None
        self._start(checkpoint, name, write, content, keep)

    def begin_copy(
        self,
        checkpoint: NewCheckpoint,
        source: Path,
        row: dict[str, Any] | None,
        content: Mapping[str, Any],
        keep: int,
    ) -> None:
        """Begin to copy a checkpoint from node-local disks; first wait for the save before.

        Collective over all ranks; errors as `begin`.

        Parameters
        ----------
        source : Path
            The checkpoint on this node.
        row : dict or None
            The row of this rank's shard, if it has one.
        """
        self.finish()

        def write(check: Callable[[], None]) -> dict[str, Any] | None:
            if row is None:
                return None
            return checkpoint.copy_shard(source / row["file"], row, check)

        name = None if row is None else (row["file"], row["keys"])
        self._start(checkpoint, name, write, content, keep)

    def _start(
        self,
        checkpoint: NewCheckpoint,
        name: tuple[str, list[str]] | None,
        write: Callable[[Callable[[], None]], dict[str, Any] | None],
        content: Mapping[str, Any],
        keep: int,
    ) -> None:
        """Start the writer of this rank; `name` is that of its shard, with the keys."""
        if self._comm.rank == 0:
            checkpoint.make_folder()
        names = self._comm.allgather_object(name)
        self._unconfirmed = True
        self._pending = pending = PendingSave(self._comm, names)

        def commit(rows: Sequence[dict[str, Any] | None]) -> None:
            self._check_owner()
            checkpoint.commit(content, rows, keep)

        pending.start(lambda: write(pending.check), commit)

    def poll(self) -> None:
        """Advance the pending save, if there is one; never wait. Local.

        Raises
        ------
        CheckpointError
            This rank could not write.
        """
        if self._pending is not None and self._pending.advance():
            self.write_s = time.monotonic() - self._pending.start_s
            self._pending = None

    def finish(self) -> None:
        """Wait until the pending save is complete. Collective over all ranks; errors as `poll`."""
        if not self._unconfirmed:
            return
        if self._pending is not None:
            self._pending.wait()
            self.poll()
        self._comm.allgather_object("done")
        self._unconfirmed = False

    def discard(self) -> None:
        """End the pending save of a run that fails, at once; it stays incomplete. Local."""
        if self._pending is not None:
            self._pending.discard()
        self._pending, self._unconfirmed = None, False


@final
class PendingSave:
    """One save, from the copy to the commit, as one rank sees it.

    Parameters
    ----------
    names : list of (str, list of str) or None
        File and keys of the shard of each rank; None for a rank without a shard.
    """

    def __init__(self, comm: Comm, names: Sequence[tuple[str, list[str]] | None]) -> None:
        self._comm = comm
        self._names = names
        self._discarded = threading.Event()
        self._messages: dict[int, np.ndarray] = {}
        self._requests: dict[int, PointToPointRequest] = {}
        self._committer: BackgroundWork[None] | None = None
        self.start_s = time.monotonic()

    def start(
        self,
        write: Callable[[], dict[str, Any] | None],
        commit: Callable[[Sequence[dict[str, Any] | None]], None],
    ) -> None:
        """Start the writer, and on rank 0 the receives of the rows of all other ranks.

        Parameters
        ----------
        write : callable
            Writes the shard and returns its row.
        commit : callable
            Commits the checkpoint on rank 0.
        """
        self._commit = commit
        if self._comm.rank == 0:
            for rank, name in enumerate(self._names):
                if rank and name is not None:
                    self._messages[rank] = np.zeros(ROW.size, dtype=np.uint8)
                    self._requests[rank] = self._comm.transport.irecv(
                        self._messages[rank], rank, ROW_TAG
                    )
        self._writer = BackgroundWork("dtrain-checkpoint", write)

    def check(self) -> None:
        """End the writer if the save is discarded."""
        if self._discarded.is_set():
            raise SaveDiscarded

    def advance(self) -> bool:
        """Do what can be done without waiting; return whether this rank has finished."""
        if self._writer.is_alive():
            return False
        row = self._writer.result()
        if self._comm.rank == 0:
            return self._advance_commit(row)
        if row is None:
            return True
        if not self._requests:
            data = ROW.pack(row["bytes"], bytes.fromhex(row[SHARD_HASH]))
            self._messages[0] = np.frombuffer(data, dtype=np.uint8).copy()
            self._requests[0] = self._comm.transport.isend(
                self._messages[0], 0, ROW_TAG, count_bytes=False
            )
        return self._requests[0].test()

    def _advance_commit(self, row: dict[str, Any] | None) -> bool:
        """Commit once the rows of all ranks are there; return whether that is done."""
        if self._committer is None:
            if not all(request.test() for request in self._requests.values()):
                return False
            rows = [row, *(self._received_row(rank) for rank in range(1, self._comm.size))]
            self._committer = BackgroundWork("dtrain-commit", lambda: self._commit(rows))
        if self._committer.is_alive():
            return False
        self._committer.result()
        return True

    def _received_row(self, rank: int) -> dict[str, Any] | None:
        name = self._names[rank]
        if name is None:
            return None
        size, digest = ROW.unpack(self._messages[rank].tobytes())
        return {"file": name[0], "bytes": size, SHARD_HASH: digest.hex(), "keys": name[1]}

    def wait(self) -> None:
        """Wait until this rank has finished."""
        self._writer.result()
        self._comm.wait(
            lambda: self.advance() or self._committer is not None,
            "the shards of a checkpoint, from all ranks",
        )
        if self._committer is not None:
            self._committer.result()

    def discard(self) -> None:
        """End the threads, and withdraw the receives."""
        self._discarded.set()
        self._writer.join(DISCARD_S)
        if self._committer is not None:
            self._committer.join(DISCARD_S)
        if self._comm.rank == 0 and self._committer is None:
            for request in self._requests.values():
                if not request.test():
                    request.cancel()
