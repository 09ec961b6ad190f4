"""The node-local level of checkpoints: saves go to a disk of each node, and from there behind the
training into the run folder.

Invariant: a run resumes from the run folder alone. A start first copies the newest complete
checkpoint of the node-local level there, if it is newer and the nodes of the start hold all of its
shards; every copy is compared with the hash of the manifest.

::

    $TMPDIR/dtrain-<id of the run folder>/<host>/
      update-00000300/
        manifest.json            of the whole checkpoint, the same on all nodes
        replica-0-stage-1.h5     of the ranks of this host
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, final

from torch import Tensor

from dtrain.checkpoint import files, ownership
from dtrain.checkpoint.manifest import checkpoint_names, read_manifest
from dtrain.checkpoint.manifest_file import MANIFEST_NAME, read_manifest_content
from dtrain.checkpoint.run_folder import CHECKPOINT_FOLDER
from dtrain.checkpoint.shard_file import hash_file
from dtrain.checkpoint.store import NewCheckpoint, manifest_content
from dtrain.comm.agree import all_or_none, broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.errors import CheckpointError, ConfigError

ID_FILE = "local-level.json"
"""In the folder of the checkpoints; names the folder on the nodes."""


LOCAL_KEEP = 2
"""Complete checkpoints that remain on a node: the newest, and the one that is being copied."""


Offers = dict[str, dict[str, Any]]
"""What the disk of a node holds, by name of the checkpoint: the hash of the manifest, the names of
all shards, and of those that are there."""


@final
class LocalLevel:
    """The node-local level of a run, as one rank sees it. Collective over all ranks.

    Parameters
    ----------
    setting : str
        ``[checkpoint] local``.
    out : Path
        The run folder.

    Attributes
    ----------
    folder : Path
        The folder of this host.
    """

    def __init__(self, setting: str, out: Path, comm: Comm) -> None:
        run_id = broadcast_object(comm, partial(_make_id, out / CHECKPOINT_FOLDER))
        self._comm = comm
        self._leads = _leads_host(comm)
        self.folder = all_or_none(comm, partial(_host_folder, setting, run_id, comm))

    def save(
        self, update: int, shard: str, tensors: Mapping[str, Tensor], content: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Write one checkpoint; return the row of this rank's shard. Collective over all ranks.

        Parameters are those of `store.save`; `content` is the manifest without its shards, that of
        rank 0 counts.

        Raises
        ------
        CheckpointError
            On a rank that cannot write.
        """
        comm, checkpoint = self._comm, NewCheckpoint(self.folder, update)
        if self._leads:
            checkpoint.make_folder()
        contents = comm.allgather_object(content if comm.rank == 0 else None)
        row = checkpoint.write_shard(shard, tensors) if tensors else None
        rows = comm.allgather_object(row)
        if self._leads:
            checkpoint.commit(contents[0], rows, LOCAL_KEEP)
        comm.allgather_object("done")
        return row

    def remove(self) -> None:
        """Delete the folder of this host, once the run folder has all that it holds. Local."""
        if self._leads and self.folder.is_dir():
            with suppress(OSError):
                files.delete_folder(self.folder)
                files.calls.rmdir(self.folder.parent)


def recover(comm: Comm, out: Path, setting: str, keep: int) -> list[str]:
    """Copy the newest checkpoint of the node-local level into the run folder, if it is newer.

    Collective over all ranks.

    Parameters
    ----------
    out : Path
        The run folder.
    setting : str
        ``[checkpoint] local``.
    keep : int
        Number of complete checkpoints that remain in the run folder.

    Returns
    -------
    list of str
        Notes on what was copied.
    """
    run_id, newest = broadcast_object(comm, partial(_run_state, out / CHECKPOINT_FOLDER))
    if run_id is None:
        return []
    folder = all_or_none(comm, partial(_host_folder, setting, run_id, comm))
    offers = comm.allgather_object(offered(folder, newest) if _leads_host(comm) else {})
    names = {name for offer in offers for name in offer}
    complete = {name: sources for name in names if (sources := find_sources(name, offers))}
    if not complete:
        return []
    owner = broadcast_object(comm, partial(ownership.acquire, out))
    try:
        for name in sorted(complete, key=_update, reverse=True):
            checkpoint = NewCheckpoint(out / CHECKPOINT_FOLDER, _update(name))
            if _copy(comm, checkpoint, folder / name, complete[name], keep):
                return [f"the checkpoint of update {_update(name):,} came from node-local disks"]
    finally:
        if comm.rank == 0:
            ownership.release(out, owner)
    return []


def host_folders(setting: str, out: Path) -> list[Path]:
    """Return the node-local folders of a run that this machine sees."""
    run_id = _read_id(out / CHECKPOINT_FOLDER)
    root = Path(os.path.expandvars(setting)).expanduser() / f"dtrain-{run_id}"
    return sorted(root.iterdir()) if run_id is not None and root.is_dir() else []


def offered(folder: Path, newest: int) -> Offers:
    """Return the checkpoints in a host's folder that hold more than `newest` updates.

    One whose manifest is damaged is left out.
    """
    offers: Offers = {}
    for name in checkpoint_names(folder):
        with suppress(CheckpointError, OSError):
            shards = read_manifest(folder / name).hashes
            present = [shard for shard in shards if (folder / name / shard).is_file()]
            digest = hash_file(folder / name / MANIFEST_NAME)
            if _update(name) > newest:
                offers[name] = {"manifest": digest, "shards": [*shards], "present": present}
    return offers


def find_sources(name: str, offers: list[Offers]) -> dict[str, int]:
    """Return the rank that copies each shard of a checkpoint; empty if one is missing.

    Parameters
    ----------
    offers : list of Offers
        Of each rank.
    """
    holders = {rank: offer[name] for rank, offer in enumerate(offers) if name in offer}
    first = next(iter(holders.values()))
    if any(holder["manifest"] != first["manifest"] for holder in holders.values()):
        return {}
    sources = {
        shard: rank for rank, holder in reversed(holders.items()) for shard in holder["present"]
    }
    return sources if sources.keys() == set(first["shards"]) else {}


def _copy(
    comm: Comm, checkpoint: NewCheckpoint, source: Path, sources: dict[str, int], keep: int
) -> bool:
    """Copy a checkpoint into the run folder; return whether all shards were whole. Collective."""
    broadcast_object(comm, checkpoint.make_folder)
    result: list[Any] | None = [[], None]
    try:
        mine = sorted(shard for shard, rank in sources.items() if rank == comm.rank)
        if mine:
            content = read_manifest_content(source)
            rows = {name: {"file": name, **content["shards"][name]} for name in mine}
            parts = content["run"], content["state"], content.get("fingerprint")
            copied = [checkpoint.copy_shard(source / name, rows[name]) for name in mine]
            result = [copied, manifest_content(*parts)]
    except CheckpointError:
        result = None
    results = comm.allgather_object(result)
    if None in results:
        return False
    content = next(content for _, content in results if content is not None)
    rows_of_all = [row for rows, _ in results for row in rows]
    broadcast_object(comm, partial(checkpoint.commit, content, rows_of_all, keep))
    return True


def _leads_host(comm: Comm) -> bool:
    """Return whether this rank is the first one of its host."""
    return comm.hosts.index(comm.hosts[comm.rank]) == comm.rank


def _update(name: str) -> int:
    return int(name.partition("-")[2])


def _host_folder(setting: str, run_id: str, comm: Comm) -> Path:
    """Return the folder of this rank's host."""
    root = Path(os.path.expandvars(setting)).expanduser()
    if "$" in str(root) or not root.is_absolute():
        raise ConfigError(
            "checkpoint.local-path",
            f'[checkpoint] local = "{setting}" is {root} on {comm.hosts[comm.rank]}: give an '
            "absolute path on a disk of the node, with environment variables that all ranks have",
        )
    return root / f"dtrain-{run_id}" / comm.hosts[comm.rank]


def _make_id(folder: Path) -> str:
    """Return what names this run on the nodes; a new run folder has another one."""
    run_id = _read_id(folder)
    if run_id is None:
        run_id = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        files.replace_file(folder / ID_FILE, json.dumps({"id": run_id}))
    return run_id


def _read_id(folder: Path) -> str | None:
    try:
        content = json.loads(files.read_plain_file(folder / ID_FILE, 1 << 16))
    except (OSError, ValueError):
        return None
    run_id = content.get("id") if isinstance(content, dict) else None
    return run_id if isinstance(run_id, str) and run_id.isalnum() else None


def _run_state(folder: Path) -> list[Any]:
    """Return the name of the run on the nodes, and the updates of the newest checkpoint."""
    names = checkpoint_names(folder) if folder.is_dir() else []
    return [_read_id(folder), _update(names[-1]) if names else -1]
