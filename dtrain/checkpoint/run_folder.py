"""The run folder: who owns it, and the files that tell what happened.

Invariant: one run at a time writes into a folder. It is taken with an exclusive create that names
job, host and process; `summary.json` is there from the start and is always a whole file.

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

from dtrain.errors import ConfigError

OWNER_FILE = "owner.json"


FLIGHT_FOLDER = "flight"


Owner = dict[str, Any]


def acquire(folder: Path) -> Owner:
    """Take a run folder for this process, making it if needed; return the token that gives it back.

    Raises
    ------
    DtrainError
        Another process owns it: the message names the owner and the file to delete. A folder
        whose owner is gone (no such process on this host, or the same job started again) is
        taken over.
    """
    mine = _this_process()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Linked into place when it is written: nobody ever sees half of it.
        whole = folder / f".{OWNER_FILE}-{mine['host']}-{mine['process']}"
        whole.write_text(json.dumps(mine), encoding="utf-8")
        try:
            return _claim(folder, whole, mine)
        finally:
            whole.unlink()
    except OSError as error:
        where = f"cannot use the run folder {folder}"
        raise ConfigError("todo.key", f"{where}: {error.strerror}; choose another --out") from error


def _claim(folder: Path, draft: Path, claimant: Owner) -> Owner:
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
    told = ", ".join(f"{key} {value}" for key, value in owner.items() if key != "since")
    dead = (
        f"if `squeue -j {owner['job']}` no longer shows it" if "job" in owner else "if it is dead"
    )
    raise ConfigError(
        "todo.key",
        f"the run folder {folder} belongs to a run that has not given it back ({told}): {dead}, "
        f"delete {folder / OWNER_FILE}; else choose another --out",
    )


def check_visible(folder: Path, host: str, timeout_s: float = 5.0) -> None:
    """Refuse a run folder that a rank on `host` cannot see, though the first rank has taken it."""
    deadline = time.monotonic() + timeout_s
    while not (folder / OWNER_FILE).exists():
        if time.monotonic() < deadline:
            time.sleep(0.1)  # a network file system may be a little behind
            continue
        raise ConfigError(
            "todo.key",
            f"the run folder {folder.absolute()} is not visible on {host}: choose an --out on a "
            "file system that all hosts share",
        )


def archive(folder: Path, name: str, attempt: int) -> None:
    """Put a folder of an earlier attempt aside, as `NAME-NNN`, in the place of an older one."""
    aside = folder / f"{name}-{attempt:03d}"
    with suppress(OSError):  # the run matters more
        if (folder / name).is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            (folder / name).rename(aside)


def release(folder: Path, token: Owner) -> bool:
    """Give the folder back, if `token` still owns it; return whether this call did it."""
    if _read_owner(folder / OWNER_FILE) != token:
        return False
    try:
        (folder / OWNER_FILE).unlink()
    except OSError:  # another rank was faster
        return False
    return True


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, whole or not at all."""
    part = folder / f".summary-{os.getpid()}.json"
    part.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(folder / "summary.json")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return what `summary.json` says, None where there is none."""
    try:
        told = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def release_unfinished(folder: Path, token: Owner, status: str, reason: str) -> bool:
    """Note how a run ended that did not finish, and give its folder back.

    Returns
    -------
    bool
        Whether this call did it: of several ranks that fail, the first. It may say so although
        the summary could not be written: a full disk must not hide why the run ended.
    """
    told = read_summary(folder)
    if not release(folder, token):
        return False
    if told is not None:
        with suppress(OSError):
            write_summary(folder, told | {"status": status, "error": reason})
    return True


def append_record(folder: Path, kind: str, time_s: float, **values: Any) -> None:
    """Append one record to `metrics.jsonl`; `time_s` is the run's own time, over all attempts."""
    told = {"kind": kind, "time_s": round(time_s, 3), "unix_s": round(time.time(), 3)} | values
    line = json.dumps(told, allow_nan=False)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _this_process() -> Owner:
    pid = os.getpid()
    number = slurm_job_id()
    restart = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("DTRAIN_RESTART")
    own = {"host": socket.gethostname(), "process": pid, "since": _process_start(pid)}
    return own if number is None else {"job": number, "restart": restart or "0"} | own


def slurm_job_id() -> str | None:
    """Return the number of the Slurm job that this process belongs to."""
    # `--ranks` hides Slurm from the ranks' MPI library, so it passes this on.
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("DTRAIN_JOB")


def _evict(folder: Path, owner: Owner | None) -> None:
    """Remove what the owner that is gone left behind, and not what a faster process put there."""
    aside = folder / f".{OWNER_FILE}-{os.getpid()}"
    try:
        (folder / OWNER_FILE).rename(aside)
    except FileNotFoundError:
        return
    if _read_owner(aside) != owner:
        with suppress(FileExistsError):
            os.link(aside, folder / OWNER_FILE)
    aside.unlink()


def _read_owner(path: Path) -> Owner | None:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _is_gone(owner: Mapping[str, Any], claimant: Mapping[str, Any]) -> bool:
    """Tell whether an owner is known to be gone: no such process here, or my own job restarted."""
    requeued = owner.get("restart") != claimant.get("restart")
    if "job" in owner and owner["job"] == claimant.get("job") and requeued:
        return True
    if owner.get("host") != claimant["host"]:
        return False
    since = _process_start(owner.get("process", 0))
    return since is None or since != owner.get("since")


def _process_start(pid: int) -> str | None:
    """Return when a process started, in the kernel's own words; None where it does not run.

    A process number may be used again, its start may not. Where there is no /proc, a process
    that runs has an unknown but constant start.
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
