"""Checks of the file system of a run folder: rename, hard links, fsync, space, locks.

Invariant: everything is written into a new folder inside it, which is removed again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from dtrain.doctor.finding import Finding

FSYNC_BYTES = 1 << 20


SLOW_FSYNC_S = 0.5
"""Seconds of a megabyte's fsync above which checkpoints of many files are slow."""


LITTLE_SPACE = 1 << 30
"""Free bytes below which a checkpoint of a common model may fail."""


ANSWER_S = 30.0
"""Seconds in which a file system must answer; dead ones of a network block for ever."""


CLOCK_SKEW_S = 5.0
"""Skew of the file system's clock above which ages of files mislead."""


LOCAL_TYPES = ("tmpfs", "ramfs")


@final
@dataclass(frozen=True)
class FolderFacts:
    """The file system of a folder.

    Attributes
    ----------
    error : str
        Why nothing can be written; empty: it can.
    rename_error, link_error, lock_error : str
        Why atomic rename onto an existing file, hard links, HDF5's locks fail; empty: they work.
    fsync_s : float
        Seconds of writing and fsync of a megabyte, median of three.
    clock_offset_s : float
        Clock of the file system minus that of this node, in seconds.
    type : str
        Type of the file system; empty: unknown.
    answers : bool
        False: it did not answer in time, and nothing else is known.
    """

    folder: str
    error: str = ""
    rename_error: str = ""
    link_error: str = ""
    lock_error: str = ""
    fsync_s: float = 0.0
    free_bytes: int = 0
    type: str = ""
    clock_offset_s: float = 0.0
    answers: bool = True


def facts_within_limit(folder: Path) -> FolderFacts:
    """Return `folder_facts`, or that the file system does not answer within `ANSWER_S`.

    The thread that waits for a dead file system cannot be ended; it does not keep the process.
    """
    results: list[FolderFacts] = []
    thread = threading.Thread(
        target=lambda: results.append(folder_facts(folder)), daemon=True, name="dtrain-doctor-files"
    )
    thread.start()
    thread.join(ANSWER_S)
    return results[0] if results else FolderFacts(str(folder), answers=False)


def folder_facts(folder: Path) -> FolderFacts:
    """Try the file system of a run folder; of one that does not exist yet, that of its parent."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        trial = Path(tempfile.mkdtemp(prefix=".dtrain-doctor-", dir=place))
    except OSError as error:
        return FolderFacts(str(folder), error=error.strerror or str(error))
    try:
        return FolderFacts(
            str(folder),
            rename_error=_try_rename(trial),
            link_error=_try_link(trial),
            lock_error=_try_lock(trial),
            fsync_s=_time_fsync(trial),
            free_bytes=shutil.disk_usage(place).free,
            type=file_system_type(place),
            clock_offset_s=_clock_offset(trial),
        )
    except OSError as error:
        return FolderFacts(str(folder), error=error.strerror or str(error))
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _try_rename(trial: Path) -> str:
    """Rename a file onto another, and a folder; return the error."""
    for name in ("old", "new"):
        (trial / name).write_text(name, encoding="utf-8")
    try:
        os.replace(trial / "new", trial / "old")
        (trial / "folder").mkdir()
        os.rename(trial / "folder", trial / "renamed")
    except OSError as error:
        return error.strerror or str(error)
    text = (trial / "old").read_text(encoding="utf-8")
    return "" if text == "new" else "the old content is still there"


def _try_link(trial: Path) -> str:
    (trial / "target").touch()
    try:
        os.link(trial / "target", trial / "link")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _try_lock(trial: Path) -> str:
    """Write and read an HDF5 file with its locks; return the error."""
    import h5py

    try:
        for mode in ("w", "r"):
            with h5py.File(trial / "lock.h5", mode, locking=True) as file:
                file.keys()
    except (OSError, ValueError) as error:
        return str(error).splitlines()[0]
    return ""


def _clock_offset(trial: Path) -> float:
    """Return how far the time of a new file lies outside the time in which it was written."""
    before = time.time()
    (trial / "now").write_bytes(b".")
    after, written = time.time(), (trial / "now").stat().st_mtime
    return min(0.0, written - before) + max(0.0, written - after)


def _time_fsync(trial: Path) -> float:
    times = []
    for number in range(3):
        start = time.perf_counter()
        with open(trial / f"data-{number}", "wb") as file:
            file.write(os.urandom(FSYNC_BYTES))
            file.flush()
            os.fsync(file.fileno())
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


def file_system_type(place: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Return the type of the file system of a path, by the kernel's table of mounts."""
    best, kind = "", ""
    with suppress(OSError):
        for line in mounts.read_text(encoding="utf-8").splitlines():
            fields = line.split()
            point = fields[1].replace("\\040", " ")
            if place.resolve().is_relative_to(point) and len(point) >= len(best):
                best, kind = point, fields[2]
    return kind


def check_folder(facts: FolderFacts) -> list[Finding]:
    """Return the findings of a run folder."""
    if not facts.answers:
        return [
            Finding(
                "files.no-answer",
                "problem",
                f"the file system of {facts.folder} does not answer within {ANSWER_S:g} s",
                "choose another --out, and report the file system (`df` hangs on it too)",
            )
        ]
    if facts.error:
        return [
            Finding(
                "run-folder.unusable",
                "problem",
                f"cannot use the run folder {facts.folder}: {facts.error}",
                "choose another --out",
            )
        ]
    return [*_check_operations(facts), *_check_speed(facts)]


def _check_operations(facts: FolderFacts) -> list[Finding]:
    findings = []
    if facts.rename_error:
        findings.append(
            Finding(
                "files.no-rename",
                "problem",
                f"{facts.folder} has no atomic rename ({facts.rename_error}); checkpoints need it",
                "choose an --out on the parallel or a local file system",
            )
        )
    if facts.link_error:
        findings.append(
            Finding(
                "files.no-hard-links",
                "note",
                f"{facts.folder} has no hard links ({facts.link_error}); run folders are locked by "
                "an exclusive create instead",
                "nothing to do",
            )
        )
    if facts.lock_error:
        findings.append(
            Finding(
                "files.hdf5-locks",
                "note",
                f"HDF5 cannot lock files in {facts.folder} ({facts.lock_error}); dtrain opens "
                "its files without locks, other programs fail",
                "export HDF5_USE_FILE_LOCKING=FALSE for your own programs",
            )
        )
    return findings


def _check_speed(facts: FolderFacts) -> list[Finding]:
    findings = []
    if facts.fsync_s > SLOW_FSYNC_S:
        findings.append(
            Finding(
                "files.slow-fsync",
                "note",
                f"a megabyte with fsync takes {facts.fsync_s:.1f} s in {facts.folder}",
                "save less often ([checkpoint] every, every-minutes), or choose a faster --out",
            )
        )
    if abs(facts.clock_offset_s) > CLOCK_SKEW_S:
        findings.append(
            Finding(
                "files.clock-skew",
                "note",
                f"the clock of the file system of {facts.folder} differs by "
                f"{facts.clock_offset_s:+.1f} s from that of this node: ages of files mislead",
                "let the administrator start NTP or chrony on the node and on the file server",
            )
        )
    if facts.free_bytes < LITTLE_SPACE:
        findings.append(
            Finding(
                "files.little-space",
                "problem",
                f"{facts.folder} has {facts.free_bytes / 1e6:,.0f} MB of free space",
                "free space or choose another --out; `dtrain plan` counts the bytes of a rank",
            )
        )
    if facts.type in LOCAL_TYPES:
        findings.append(
            Finding(
                "files.in-memory",
                "note",
                f"{facts.folder} is in the memory of this node ({facts.type}): other nodes do not "
                "see it, and its files end with the job",
                "choose an --out on a file system that all hosts share",
            )
        )
    return findings


def check_visible(folder: Path, hosts: Sequence[str], sees: Sequence[bool]) -> list[Finding]:
    """Return the finding of a folder that ranks on some hosts do not see."""
    blind = sorted({host for host, seen in zip(hosts, sees, strict=True) if not seen})
    if not blind:
        return []
    shown = ", ".join(blind[:4]) + (f" and {len(blind) - 4} more" if len(blind) > 4 else "")
    return [
        Finding(
            "run-folder.not-shared",
            "problem",
            f"the run folder {folder.absolute()} is not visible on {shown}",
            "choose an --out on a file system that all hosts share",
        )
    ]


def folder_summary(facts: FolderFacts) -> str:
    """Return the line of a run folder."""
    if facts.error or not facts.answers:
        return f"{facts.folder}: {facts.error or 'no answer'}"
    works = [
        name
        for name, error in (
            ("rename", facts.rename_error),
            ("hard links", facts.link_error),
            ("HDF5 locks", facts.lock_error),
        )
        if not error
    ]
    return (
        f"{facts.folder}: {facts.type or 'unknown type'}, {', '.join(works)}, fsync of 1 MB in "
        f"{facts.fsync_s * 1e3:.1f} ms, {facts.free_bytes / 1e9:,.1f} GB free"
    )
