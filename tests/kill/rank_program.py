"""The program of a rank: trains `run.toml` into `out`, reports progress, and kills when told to.

`DTRAIN_KILL` holds the JSON of a `Kill` (`harness.py`), or nothing. The rank `killer` kills at the
given file call inside a save or after the last update, or some time after training has begun. It
appends what it is about to kill to `kills.jsonl`, and rank 0 its progress to `progress.jsonl`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import dtrain
from dtrain.checkpoint import files
from tests.kill.processes import find_targets, kill, parent

RANK = int(os.environ["OMPI_COMM_WORLD_RANK"])
MPIRUN = os.getppid()
LAUNCHER = parent(MPIRUN)
ORPHAN_NAP_S = 0.3
"""Seconds by which each update takes longer once mpirun or its parent is dead, so that the run does
not reach its end before the limit."""
STAGES = os.environ["DTRAIN_KILL_STAGES"]
NAP_S = float(os.environ["DTRAIN_KILL_NAP_S"])
KILL = json.loads(os.environ.get("DTRAIN_KILL") or "{}")
IS_KILLER = bool(KILL) and KILL["killer"] == RANK


def append(name: str, record: dict[str, Any]) -> None:
    """Append a record to a file by one call of the kernel, so that it survives a kill."""
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(descriptor, (json.dumps(record) + "\n").encode())
    os.close(descriptor)


def strike(call: str = "") -> None:
    """Kill what `KILL` names."""
    targets = find_targets(KILL["target"], LAUNCHER, KILL["number"])
    append("kills.jsonl", {"time": time.time(), "call": call, "targets": len(targets)})
    kill(targets, last=os.getpid())


class CountingCalls(files.FileCalls):
    """Counts calls, and kills before one of them, or in the middle of a write.

    Parameters
    ----------
    folder : str
        The part of the path of all files whose calls are counted.
    """

    def __init__(self, folder: str) -> None:
        self.left = KILL["call"]
        self.folder = folder

    def _count(self, name: str, path: str | Path | int, data: memoryview | None = None) -> int:
        """Count a call, and kill if it is the one; return the bytes that a torn write has done."""
        written, descriptor = 0, path
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if self.folder not in str(path):
            return written
        self.left -= 1
        if self.left == -1:
            if data is not None and KILL["torn"] and isinstance(descriptor, int):
                written = os.write(descriptor, data[: len(data) // 2])
            strike(name)
            time.sleep(KILL["wait_s"])  # another process was killed: this one may go on
        return written

    def open(self, path: str | Path, flags: int) -> int:
        self._count("open", path)
        return super().open(path, flags)

    def write(self, descriptor: int, data: memoryview) -> int:
        return self._count("write", descriptor, data) or super().write(descriptor, data)

    def truncate(self, descriptor: int, size: int) -> None:
        self._count("truncate", descriptor)
        super().truncate(descriptor, size)

    def fsync(self, descriptor: int) -> None:
        self._count("fsync", descriptor)
        super().fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._count("rename", source)
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._count("link", target)
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self._count("unlink", path)
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self._count("mkdir", path)
        super().mkdir(path)

    def rmdir(self, path: Path) -> None:
        self._count("rmdir", path)
        super().rmdir(path)


def report(session: dtrain.Session, event: dtrain.Event) -> None:
    """Note progress, start the timer of a kill, and slow the run down a little."""
    update = session.update if event.kind == "start" else event.update
    if RANK == 0:
        append("progress.jsonl", {"event": event.kind, "update": update, "time": time.time()})
    if IS_KILLER and (KILL["phase"], event.kind) == ("train", "start"):
        timer = threading.Timer(KILL["delay_s"], strike)
        timer.daemon = True
        timer.start()
    if IS_KILLER and (KILL["phase"], event.kind) == ("end", "end"):
        files.calls = CountingCalls("")
    if event.kind == "update":
        time.sleep(NAP_S if (os.getppid(), parent(MPIRUN)) == (MPIRUN, LAUNCHER) else ORPHAN_NAP_S)


def main() -> None:
    """Train on this rank."""
    if IS_KILLER and KILL["phase"] == "save":
        files.calls = CountingCalls("checkpoints")
    run = dtrain.Run.read("run.toml", [f"mesh.stages={STAGES}"])
    dtrain.train(run, "out", callbacks=[report])


if __name__ == "__main__":
    main()
    sys.exit(0)
