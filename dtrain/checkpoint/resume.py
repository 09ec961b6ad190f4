"""Find the checkpoint that a run resumes from, and pass over damaged ones.

Invariant: all ranks resume from the same checkpoint, whose shards were all hashed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from dtrain.checkpoint.manifest import (
    Manifest,
    checkpoint_names,
    latest_checkpoint,
    read_manifest,
)
from dtrain.checkpoint.ownership import OWNER_FILE
from dtrain.checkpoint.run_folder import CHECKPOINT_FOLDER, RECORDS
from dtrain.comm.agree import broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.config.run import RUN_FILE_HEADER
from dtrain.errors import CheckpointError, ConfigError
from dtrain.schema import Table

OWN_FILES = (
    *(f".{OWNER_FILE}*", "flight*"),
    *("job.sh", ".job.sh-*", "job.log", "slurm-*.log", ".requeues"),
)
"""Files of a job script, and those that a start leaves which ends before it trains."""


DRAFTS = tuple(f".{name}-*" for name in RECORDS)
"""Files that are left where a process is killed while it writes."""


RUN_FOLDER_FILES = {"summary.json", CHECKPOINT_FOLDER, OWNER_FILE}


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from, the same on all ranks.

    Attributes
    ----------
    checkpoint : str or None
        Its folder; None: the run starts afresh.
    run_table : dict or None
        The resolved run that wrote it.
    updates : int
        Updates that it holds.
    fingerprint : dict
        What identifies its model and its data; empty where that is not known.
    damaged : dict of str to str
        Folders of newer checkpoints that are damaged, and what is wrong with each.
    """

    checkpoint: str | None = None
    run_table: Table | None = None
    updates: int = 0
    fingerprint: Table = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def from_manifest(manifest: Manifest | None) -> ResumePoint:
        """Return the resume point of a checkpoint, or of none."""
        if manifest is None:
            return ResumePoint()
        return ResumePoint(
            str(manifest.folder),
            manifest.run_table,
            int(manifest.state["update"]),
            manifest.fingerprint,
        )


def find_resume_point(comm: Comm, out: Path, resume: str) -> ResumePoint:
    """Return the checkpoint that a run into `out` resumes from. Collective over `comm`.

    The ranks share the shards of the newest checkpoint and hash them. Where one is damaged, the
    checkpoint before it is taken. Parameters and errors are those of `find_checkpoint`.
    """
    damaged: dict[str, str] = {}

    def newest() -> list[dict[str, Any]]:
        manifest = find_checkpoint(out, resume, damaged)
        return [asdict(ResumePoint.from_manifest(manifest)), damaged]

    while True:
        record, damaged = broadcast_object(comm, newest)
        point = replace(ResumePoint(**record), damaged=damaged)
        if point.checkpoint is None:
            return point
        reasons = comm.allgather_object(_damaged_shard(Path(point.checkpoint), comm))
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is None:
            return point
        damaged[point.checkpoint] = reason


def _damaged_shard(folder: Path, comm: Comm) -> str | None:
    """Return what is wrong with this rank's share of the shards of a checkpoint."""
    try:
        manifest = read_manifest(folder)
        for name in sorted(manifest.hashes)[comm.rank :: comm.size]:
            manifest.check_shard(name)
    except CheckpointError as error:
        return error.message
    return None


def set_damaged_aside(out: Path, point: ResumePoint) -> None:
    """Rename the damaged checkpoints in `out`, so that no later start reads them."""
    for name in point.damaged:
        folder = Path(name)
        if folder.parent == out / CHECKPOINT_FOLDER and folder.exists():
            folder.rename(_free_name(folder.with_name(f"{folder.name}.damaged")))


def _free_name(path: Path) -> Path:
    others = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(name for name in chain([path], others) if not name.exists())


def damage_notes(point: ResumePoint) -> list[str]:
    """Return a note for each checkpoint that was passed over."""
    return [
        f"{message.partition(': delete')[0]}; the run resumes from the checkpoint before it, at "
        f"update {point.updates:,}, and the damaged one is kept as {Path(name).name}.damaged"
        for name, message in point.damaged.items()
    ]


def find_checkpoint(
    out: Path, resume: str, damaged: dict[str, str] | None = None
) -> Manifest | None:
    """Return the checkpoint that a run into `out` resumes from; None: it starts afresh.

    Parameters
    ----------
    damaged : dict, optional
        Folders that are passed over; a checkpoint whose manifest is damaged is added with the
        reason. Without it such a checkpoint is an error.
    resume : str
        "auto": the newest in `out`. "never": none, and `out` must be empty. "fresh": none, whatever
        `out` holds. Else the folder of another run, whose newest is taken unless `out` holds one
        already.

    Raises
    ------
    ConfigError
        `out` is not empty and no run folder, or the checkpoint that `resume` names is missing.
    CheckpointError
        The manifest of the checkpoint is damaged; with `damaged`, no checkpoint is whole.
    """
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    names -= {name for name in names if fnmatch_any(name, (*OWN_FILES, *DRAFTS))}
    if not names & (RUN_FOLDER_FILES - {OWNER_FILE}) and is_resolved_run(out / "run.toml"):
        names -= {*RECORDS}  # of a start that ended before it trained
    if resume == "never" and names - {OWNER_FILE}:
        raise ConfigError(
            "run-folder.not-empty",
            f"--resume never, but {out} is not empty: delete it or choose another --out",
        )
    if names and not names & RUN_FOLDER_FILES:
        raise ConfigError(
            "run-folder.other-files",
            f"{out} is not empty and no run folder ({', '.join(sorted(names)[:3])}): "
            "choose another --out",
        )
    if resume == "fresh":
        return None
    find = latest_checkpoint if damaged is None else partial(newest_whole, damaged=damaged)
    manifest = find(out / CHECKPOINT_FOLDER)
    if manifest is not None or resume in ("auto", "never"):
        return manifest
    manifest = find(Path(resume) / CHECKPOINT_FOLDER)
    if manifest is None:
        raise ConfigError(
            "run-folder.no-resume-checkpoint",
            f"--resume {resume}: there is no complete checkpoint in {resume}",
        )
    return manifest


def is_resolved_run(path: Path) -> bool:
    """Return whether a file is the resolved run that a start wrote, and no run file of a user."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().startswith(RUN_FILE_HEADER.partition("{")[0])
    except (OSError, ValueError):
        return False


def fnmatch_any(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name has one of some patterns, as of a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def newest_whole(folder: Path, damaged: dict[str, str]) -> Manifest | None:
    """Return the newest checkpoint in `folder` that is not known to be damaged.

    Parameters
    ----------
    damaged : dict
        As in `find_checkpoint`.

    Raises
    ------
    CheckpointError
        There are checkpoints, but none is whole.
    """
    paths = [folder / name for name in reversed(checkpoint_names(folder))]
    for path in paths:
        if str(path) in damaged:
            continue
        try:
            return read_manifest(path)
        except CheckpointError as error:
            damaged[str(path)] = error.message
    if paths:
        raise CheckpointError(
            "checkpoint.none-whole",
            f"no checkpoint in {folder} is whole; the newest: {damaged[str(paths[0])]}; choose "
            "another --out to start anew",
        )
    return None
