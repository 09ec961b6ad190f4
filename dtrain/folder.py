"""The run folder: who owns it, and the files that tell what happened.

Invariant: one run at a time writes into a folder. It is taken with an exclusive create that names
job, host and process; `summary.json` is there from the start and is always a whole file.

::

    run.toml  plan.txt  metrics.jsonl  checkpoints/  summary.json  owner.json (while it runs)
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.errors import Refusal

OWNER = "owner.json"


def take(folder: Path) -> None:
    """Take a run folder for this process, making it if needed.

    Raises
    ------
    Refusal
        Another process owns it: the message names the owner and the file to delete. A folder
        whose owner is gone (no such process on this host, or the same job started again) is
        taken over.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"cannot make the run folder {folder}: {error.strerror}") from error
    mine = _me()
    for _ in range(2):
        try:
            with (folder / OWNER).open("x", encoding="utf-8") as file:
                json.dump(mine, file)
            return
        except FileExistsError:
            owner = _owner(folder / OWNER)
            if owner is not None and not _gone(owner, mine):
                break
            _evict(folder, owner)
        except OSError as error:
            raise Refusal(f"cannot write into {folder}: {error.strerror}") from error
    told = ", ".join(f"{key} {value}" for key, value in (owner or {}).items() if key != "since")
    raise Refusal(
        f"the run folder {folder} belongs to a run that is still going ({told}): choose another "
        f"--out, or, if that run is dead, delete {folder / OWNER}"
    )


def release(folder: Path) -> None:
    """Give the folder back; whoever ends the run does it, on any rank."""
    (folder / OWNER).unlink(missing_ok=True)


def summarise(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, whole or not at all."""
    part = folder / f".summary-{os.getpid()}.json"
    part.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(folder / "summary.json")


def summary(folder: Path) -> dict[str, Any] | None:
    """Return what `summary.json` says, None where there is none."""
    try:
        told = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def fail(folder: Path, reason: str) -> None:
    """Mark a run that was going as failed, for `reason`, and give its folder back."""
    told = summary(folder)
    if told is not None and told.get("status") == "running":
        summarise(folder, told | {"status": "failed", "error": reason})
    release(folder)


def record(folder: Path, kind: str, **values: Any) -> None:
    """Append one record to `metrics.jsonl`."""
    line = json.dumps({"kind": kind, "time_s": round(time.time(), 3)} | values, allow_nan=False)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _me() -> dict[str, Any]:
    pid = os.getpid()
    # `--ranks` hides Slurm from the ranks' MPI library, so it passes these two on.
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("DTRAIN_JOB")
    restart = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("DTRAIN_RESTART")
    own = {"host": socket.gethostname(), "process": pid, "since": _since(pid)}
    return own if job is None else {"job": job, "restart": restart or "0"} | own


def _evict(folder: Path, owner: dict[str, Any] | None) -> None:
    """Remove what the owner that is gone left behind, and not what a faster process put there."""
    aside = folder / f".{OWNER}-{os.getpid()}"
    try:
        (folder / OWNER).rename(aside)
    except FileNotFoundError:
        return
    if _owner(aside) != owner:
        os.link(aside, folder / OWNER)
    aside.unlink()


def _owner(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _gone(owner: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Tell whether an owner is known to be gone: no such process here, or my own job restarted."""
    requeued = owner.get("restart") != mine.get("restart")
    if "job" in owner and owner["job"] == mine.get("job") and requeued:
        return True
    if owner.get("host") != mine["host"]:
        return False
    since = _since(owner.get("process", 0))
    return since is None or since != owner.get("since")


def _since(pid: int) -> str | None:
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
