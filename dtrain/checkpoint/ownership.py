"""Ownership of a run folder: one run at a time writes into it.

Invariant: the owner file is created exclusively and names job, host and process. A folder is taken
over only from an owner that is known to be gone: by its process where that can be seen, by the
scheduler's word, or since its file has not been touched for `LIMIT_BEATS` heartbeats.

::

    same machine and process table   the process runs, or does not
    a Slurm job                      squeue knows the job, or the step, as running, or does not
    else                             the file's time of change moves on, or stands still
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from dtrain.checkpoint import files
from dtrain.errors import ConfigError

OWNER_FILE = "owner.json"


HEARTBEAT_S = 5.0
"""Seconds between two touches of the owner file."""


LIMIT_BEATS = 12
"""Heartbeats that an owner may miss; a network file system may stand still for a while."""


WRITING_S = 0.5
"""Seconds after which an owner file that is not whole counts as damaged."""


SQUEUE_LIMIT_S = 10.0


MAX_OWNER_BYTES = 2**16


LIVE_STATES = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")


NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


Owner = dict[str, Any]


def acquire(folder: Path) -> Owner:
    """Lock a run folder for this process and return the owner to release it with.

    The folder is made if needed. A folder whose owner is gone is taken over, with a line on stderr
    if the owner was on another machine.

    Raises
    ------
    ConfigError
        Another process owns it (the message names the owner and the file to delete), or the
        folder cannot be used.
    """
    owner = _this_process()
    try:
        if not folder.is_dir():
            files.make_folder(folder)
        # Linked into place when it is written, so that no reader finds half of it.
        draft = _own_name(folder)
        files.write_file(draft, json.dumps(owner), sync=True)
        try:
            claimed = _claim(folder, draft, owner)
        finally:
            with suppress(OSError):  # a later start deletes it
                files.calls.unlink(draft)
        with suppress(OSError):  # after a power cut, too, this is known as a run folder
            files.fsync(folder)
        return claimed
    except OSError as error:
        raise ConfigError(
            "run-folder.unusable",
            f"cannot use the run folder {folder}: {error.strerror}; choose another --out",
        ) from error


def release(folder: Path, owner: Owner) -> bool:
    """Unlock the folder, if `owner` still owns it; return whether this call did it."""
    if read_owner(folder / OWNER_FILE) != owner:
        return False
    try:
        files.calls.unlink(folder / OWNER_FILE)
    except OSError:  # another rank was faster
        return False
    return True


def check_owned(folder: Path, owner: Owner) -> None:
    """Refuse to write into a folder that another run has taken over meanwhile.

    Raises
    ------
    ConfigError
        The owner file is that of another run, or gone.
    """
    current = read_owner(folder / OWNER_FILE)
    if current != owner:
        raise ConfigError(
            "run-folder.taken-over",
            f"the run folder {folder} now belongs to {_owner_text(current or {}) or 'nobody'}: "
            "this run stood still for long, or its owner file was deleted; nothing more is "
            "written into it",
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


@final
class Heartbeat:
    """A thread that touches the owner file until it is stopped.

    It touches the file that it opened at first, so never that of a later owner.
    """

    def __init__(self, folder: Path, interval_s: float = HEARTBEAT_S) -> None:
        self._descriptor = os.open(folder / OWNER_FILE, os.O_RDONLY)
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="dtrain-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._stopped.wait(self._interval_s):
            with suppress(OSError):  # a file system that is away may come back
                os.utime(self._descriptor)


def read_owner(path: Path) -> Owner | None:
    """Return the content of an owner file, None where there is none that is whole."""
    try:
        owner = json.loads(files.read_plain_file(path, MAX_OWNER_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    is_legal = isinstance(owner, dict) and isinstance(owner.get("process", 0), int)
    return owner if is_legal else None


def owner_is_gone(owner: Mapping[str, Any]) -> bool:
    """Return whether the process of an owner is known to have ended, as this machine sees it."""
    return _process_has_ended(owner, _this_process()) is True


def slurm_job_id() -> str | None:
    """Return the number of the Slurm job of this process, None outside of Slurm."""
    # `--ranks` hides Slurm from the ranks' MPI library, so it passes this on.
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("DTRAIN_JOB")


# ---- claim


def _claim(folder: Path, draft: Path, claimant: Owner) -> Owner:
    """Put the draft into place, over the file of an owner that is gone."""
    owner: Owner | None = None
    for _ in range(3):
        if _create(draft, folder / OWNER_FILE):
            return claimant
        owner = read_owner(folder / OWNER_FILE)
        if owner is None and not _has_stopped(folder / OWNER_FILE, draft, WRITING_S, beats=1):
            continue  # it was being written, and is whole now
        if owner is not None and not _is_gone(owner, claimant, folder / OWNER_FILE, draft):
            break
        _evict(folder, owner)
    owner = owner or {}
    condition = (
        f"if `squeue -j {owner['job']}` no longer shows it" if "job" in owner else "if it is dead"
    )
    raise ConfigError(
        "run-folder.locked",
        f"the run folder {folder} is locked by another run ({_owner_text(owner)}): {condition}, "
        f"delete {folder / OWNER_FILE}; else choose another --out",
    )


def _own_name(folder: Path) -> Path:
    """Return a name that no other process uses: containers may have equal names and numbers."""
    return folder / f".{OWNER_FILE}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def _create(draft: Path, path: Path) -> bool:
    """Put a draft in place unless the file exists; return whether this call did."""
    try:
        files.calls.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(draft.read_bytes())
    return True


def _evict(folder: Path, owner: Owner | None) -> None:
    """Remove the file of an owner that is gone, but not that of a faster process."""
    evicted = _own_name(folder)
    try:
        files.calls.rename(folder / OWNER_FILE, evicted)
    except FileNotFoundError:
        return
    if read_owner(evicted) != owner:
        _create(evicted, folder / OWNER_FILE)
    files.calls.unlink(evicted)


def _owner_text(owner: Mapping[str, Any]) -> str:
    keys = ("job", "restart", "host", "process")
    return ", ".join(f"{key} {owner[key]}" for key in keys if key in owner)


def _this_process() -> Owner:
    pid = os.getpid()
    restart = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("DTRAIN_RESTART")
    process: Owner = {
        "host": socket.gethostname(),
        "process": pid,
        "since": _process_start(pid),
        "machine": _machine(),
        "heartbeat_s": HEARTBEAT_S,
    }
    job = slurm_job_id()
    if job is None:
        return process
    step = os.environ.get("SLURM_STEP_ID")
    steps = {} if step is None else {"step": step}
    return {"job": job, "restart": restart or "0"} | steps | process


# ---- is an owner alive?


def _is_gone(owner: Owner, claimant: Owner, path: Path, draft: Path) -> bool:
    """Return whether an owner is known to be gone; this may wait for its next heartbeat."""
    requeued = owner.get("restart") != claimant.get("restart")
    if "job" in owner and owner["job"] == claimant.get("job") and requeued:
        return True
    has_ended = _process_has_ended(owner, claimant)
    if has_ended is not None:
        return has_ended
    word = _scheduler_says_gone(owner)
    interval = owner.get("heartbeat_s")
    if word is None and isinstance(interval, int | float) and 0 < interval < float("inf"):
        word = _has_stopped(path, draft, float(interval), LIMIT_BEATS)
    if word:
        text = f"dtrain: the owner of {path.parent} ({_owner_text(owner)}) is gone: taken over"
        print(text, file=sys.stderr, flush=True)
    return bool(word)


def _process_has_ended(owner: Mapping[str, Any], claimant: Mapping[str, Any]) -> bool | None:
    """Return whether the process has ended; None where this process cannot see it.

    Containers may share a host name and not the process table, so the name alone proves nothing.
    """
    key = "machine" if "machine" in owner and claimant.get("machine") else "host"
    if owner.get(key) != claimant.get(key):
        return None
    since = _process_start(owner.get("process", 0))
    return since is None or since != owner.get("since")


def _scheduler_says_gone(owner: Mapping[str, Any]) -> bool | None:
    """Ask Slurm whether the job, and the step in it, still run; None where Slurm cannot tell."""
    job = str(owner.get("job", ""))
    if not re.fullmatch(r"[0-9][0-9_+]*", job):
        return None
    states = _squeue("-j", job, "-o", "%T")
    if states is None:
        return None
    if not any(state in LIVE_STATES for state in states):
        return True
    if "RUNNING" not in states or "step" not in owner:
        return None if "COMPLETING" in states else False
    steps = _squeue("-s", "-j", job, "-o", "%i")
    return None if steps is None else f"{job}.{owner['step']}" not in steps


def _squeue(*words: str) -> list[str] | None:
    """Return the lines of `squeue`, none for a job that it does not know; None if it fails."""
    command = ["squeue", "--noheader", *words]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=SQUEUE_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode:
        return [] if "Invalid job id" in result.stderr else None
    return result.stdout.split()


def _has_stopped(path: Path, draft: Path, interval_s: float, beats: int) -> bool:
    """Return whether a file stays untouched for `beats` intervals; wait as long as it is unknown.

    The time of the file system is read from a file of our own there, since clocks may differ.
    """
    first = _modified(path)
    if first is None:
        return False
    while True:
        os.utime(draft)
        now, last = _modified(draft), _modified(path)
        if last is None or now is None or last != first:
            return False
        if now - last > beats * interval_s:
            return True
        time.sleep(min(0.5, interval_s / 4))


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _machine() -> str:
    """Return what identifies the machine's running kernel and its process table; "" without it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


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
