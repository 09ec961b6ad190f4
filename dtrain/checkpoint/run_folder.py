"""The run folder: the files that record a run.

Invariant: one run at a time writes into a folder (`ownership.py`). `summary.json` exists from the
start and is always a whole file.

::

    run.toml  plan.txt  metrics.jsonl  checkpoints/  summary.json  owner.json (while it runs)
    flight/ (records of ranks)  flight-001/ (those of the first attempt)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.checkpoint import files
from dtrain.checkpoint.ownership import (
    OWNER_FILE,
    Owner,
    acquire,
    owner_is_gone,
    read_owner,
    release,
)
from dtrain.checkpoint.safe_files import read_json
from dtrain.errors import CheckpointError

CHECKPOINT_FOLDER = "checkpoints"


BEST_FOLDER = "best"
"""Folder inside it that holds the best evaluated weights; no run resumes from them."""


FLIGHT_FOLDER = "flight"


RECORDS = ("summary.json", "run.toml", "plan.txt", "data-statistics.json")
"""Files that are replaced as a whole."""


def set_aside(folder: Path) -> None:
    """Rename a run folder to ``NAME.old-1``, or the first higher number that is free.

    Nothing is deleted. A folder that another process has locked is refused, as `acquire` does.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    owner, number = acquire(folder), 1
    while (target := folder.resolve().with_name(f"{folder.resolve().name}.old-{number}")).exists():
        number += 1
    folder.resolve().rename(target)
    release(target, owner)


def archive(folder: Path, name: str, attempt: int) -> None:
    """Rename a folder of an earlier attempt to `NAME-NNN`, over an older one; never raise."""
    archived = folder / f"{name}-{attempt:03d}"
    with suppress(OSError):  # the run matters more
        if (folder / name).is_dir():
            shutil.rmtree(archived, ignore_errors=True)
            (folder / name).rename(archived)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, whole or not at all.

    Raises
    ------
    CheckpointError
        It cannot be written.
    """
    write_record(folder, "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def write_record(folder: Path, name: str, text: str) -> None:
    """Write a file of the run folder, whole or not at all.

    Raises
    ------
    CheckpointError
        It cannot be written: the disk is full, for example.
    """
    try:
        files.replace_file(folder / name, text)
    except OSError as error:
        raise CheckpointError(
            "run-folder.write-failed",
            f"cannot write {folder / name}: {error.strerror}; the checkpoints are complete: free "
            "space and start the same command again",
        ) from error


def remove_drafts(folder: Path) -> None:
    """Delete what killed runs left of files that they were writing; never raise.

    The folder is locked by this process. Drafts of the owner file may belong to others that run.
    """
    for path in folder.glob(".*-*"):
        name = path.name[1:].rpartition("-")[0]
        is_left = name in RECORDS
        if path.name.startswith(f".{OWNER_FILE}-"):
            is_left = owner_is_gone(read_owner(path) or {})
        with suppress(OSError):  # the run matters more
            if is_left:
                files.calls.unlink(path)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the content of `summary.json`, None where there is none."""
    return read_json(folder, "summary.json") or None


def release_unfinished(
    folder: Path, owner: Owner, status: str, reason: str, key: str | None = None
) -> bool:
    """Record the status, reason and error key of a run that did not finish, and unlock its folder.

    Returns
    -------
    bool
        Whether this call unlocked it: the first of several ranks that fail. It is true although
        the summary could not be written: a full disk must not hide why the run ended.
    """
    summary = read_summary(folder)
    if not release(folder, owner):
        return False
    if summary is not None:
        with suppress(CheckpointError):
            write_summary(folder, summary | {"status": status, "error": reason, "error_key": key})
    return True
