"""The run folder: its owner, and the files that record a run.

Invariant: one run at a time writes into a folder. Its owner file is created exclusively and names
job, host and process. `summary.json` exists from the start and is always a whole file.

::

    run.toml  plan.txt  metrics.jsonl  checkpoints/  summary.json  owner.json (while it runs)
    flight/ (records of ranks)  flight-001/ (those of the first attempt)
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.checkpoint.files import replacing
from dtrain.errors import ConfigError

OWNER_FILE = "owner.json"


FLIGHT_FOLDER = "flight"


Owner = dict[str, Any]


def acquire(folder: Path) -> Owner:
    """Lock a run folder for this process and return the owner to release it with.

    The folder is made if needed. A folder whose owner is gone (no such process on this host, or
    the same job started again) is taken over.

    Raises
    ------
    ConfigError
        Another process owns it (the message names the owner and the file to delete), or the
        folder cannot be used.
    """
    owner = _this_process()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Linked into place when it is written, so that no reader finds half of it.
        draft = folder / f".{OWNER_FILE}-{owner['host']}-{owner['process']}"
        draft.write_text(json.dumps(owner), encoding="utf-8")
        try:
            return _claim(folder, draft, owner)
        finally:
            draft.unlink()
    except OSError as error:
        raise ConfigError(
            "run-folder.unusable",
            f"cannot use the run folder {folder}: {error.strerror}; choose another --out",
        ) from error


def _claim(folder: Path, draft: Path, claimant: Owner) -> Owner:
    """Link the draft into place, over the file of an owner that is gone."""
    owner: Owner | None = None
    for _ in range(3):
        try:
            os.link(draft, folder / OWNER_FILE)
            return claimant
        except FileExistsError:
            owner = _read_owner(folder / OWNER_FILE)
            if owner is not None and not _is_gone(owner, claimant):
                break
            _evict(folder, owner)
    owner = owner or {}
    owner_text = ", ".join(f"{key} {value}" for key, value in owner.items() if key != "since")
    condition = (
        f"if `squeue -j {owner['job']}` no longer shows it" if "job" in owner else "if it is dead"
    )
    raise ConfigError(
        "run-folder.locked",
        f"the run folder {folder} is locked by another run ({owner_text}): {condition}, delete "
        f"{folder / OWNER_FILE}; else choose another --out",
    )


def check_visible(folder: Path, host: str, timeout_s: float = 5.0) -> None:
    """Refuse a run folder that rank 0 has locked and a rank on `host` cannot see.

    Raises
    ------
    ConfigError
        The owner file did not appear within `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not (folder / OWNER_FILE).exists():
        if time.monotonic() < deadline:
            time.sleep(0.1)  # a network file system may show it later
            continue
        raise ConfigError(
            "run-folder.not-shared",
            f"the run folder {folder.absolute()} is not visible on {host}: choose an --out on a "
            "file system that all hosts share",
        )


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


def release(folder: Path, owner: Owner) -> bool:
    """Unlock the folder, if `owner` still owns it; return whether this call did it."""
    if _read_owner(folder / OWNER_FILE) != owner:
        return False
    try:
        (folder / OWNER_FILE).unlink()
    except OSError:  # another rank was faster
        return False
    return True


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, whole or not at all."""
    with replacing(folder / "summary.json") as draft:
        text = json.dumps(summary, indent=2, allow_nan=False)
        draft.write_text(text + "\n", encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the content of `summary.json`, None where there is none."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


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
        with suppress(OSError):
            write_summary(folder, summary | {"status": status, "error": reason, "error_key": key})
    return True


def _this_process() -> Owner:
    pid = os.getpid()
    job = slurm_job_id()
    restart = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("DTRAIN_RESTART")
    process = {"host": socket.gethostname(), "process": pid, "since": _process_start(pid)}
    return process if job is None else {"job": job, "restart": restart or "0"} | process


def slurm_job_id() -> str | None:
    """Return the number of the Slurm job of this process, None outside of Slurm."""
    # `--ranks` hides Slurm from the ranks' MPI library, so it passes this on.
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("DTRAIN_JOB")


def _evict(folder: Path, owner: Owner | None) -> None:
    """Remove the file of an owner that is gone, but not that of a faster process."""
    evicted = folder / f".{OWNER_FILE}-{os.getpid()}"
    try:
        (folder / OWNER_FILE).rename(evicted)
    except FileNotFoundError:
        return
    if _read_owner(evicted) != owner:
        with suppress(FileExistsError):
            os.link(evicted, folder / OWNER_FILE)
    evicted.unlink()


def _read_owner(path: Path) -> Owner | None:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _is_gone(owner: Mapping[str, Any], claimant: Mapping[str, Any]) -> bool:
    """Return whether an owner is known to be gone: its process ended here, or its job restarted."""
    requeued = owner.get("restart") != claimant.get("restart")
    if "job" in owner and owner["job"] == claimant.get("job") and requeued:
        return True
    if owner.get("host") != claimant["host"]:
        return False
    since = _process_start(owner.get("process", 0))
    return since is None or since != owner.get("since")


def owner_is_gone(owner: Mapping[str, Any]) -> bool:
    """Return whether the process of an owner is known to have ended; only its host knows."""
    return _is_gone(owner, {"host": socket.gethostname()})


def _process_start(pid: int) -> str | None:
    """Return when a process started, as the kernel writes it; None where it does not run.

    A process number may be used again; the pair of number and start may not. Without /proc, a
    running process has an unknown but constant start.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
