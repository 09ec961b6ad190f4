"""The memory that this process may still use, by the machine and by every limit that holds for it.

Invariant: a limit that cannot be read does not count. The functions take the folders /proc and /sys
and the environment as arguments and only read them.

====================  ====================================================================
machine               `MemAvailable`; without it, the machine's memory
control groups        version 2 and version 1, of the process's group and all its parents
Slurm                 memory of the job on this node
resource limits       `RLIMIT_AS`, `RLIMIT_DATA`
====================  ====================================================================
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC, SYS = Path("/proc"), Path("/sys")


MEMORY_FRACTION = 1 / 8


MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class _Files:
    """The files of a memory control group, and the key of the file cache that it can drop."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str


_FILES = {
    1: _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: _Files(("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def fits_in_memory(size_bytes: int) -> bool:
    """Return whether a copy of `size_bytes` of each rank's own is small enough to be held.

    That is an eighth of the available memory and at most 4 GiB, since the number of ranks on the
    node is not known.
    """
    return size_bytes <= min(MEMORY_FRACTION * available_bytes(), MAX_BYTES)


def available_bytes(
    proc: Path = PROC, sys: Path = SYS, environment: Mapping[str, str] | None = None
) -> int:
    """Return the bytes that this process may still use: the least of all limits."""
    return min(memory_limits(proc, sys, environment).values())


def memory_limits(
    proc: Path = PROC, sys: Path = SYS, environment: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Return what is left of each limit in bytes, at least 0, by the limit's name."""
    limits = {"machine": _machine_bytes(proc)}
    groups = list(_control_groups(proc, sys))
    if groups:
        limits["control group"] = min(groups)
    resident = _own_bytes(proc, 1)
    job = _slurm_bytes(os.environ if environment is None else environment)
    if job is not None:
        limits["Slurm"] = job - resident
    for name, kind, column in (("AS", resource.RLIMIT_AS, 0), ("DATA", resource.RLIMIT_DATA, 5)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits[f"RLIMIT_{name}"] = soft - _own_bytes(proc, column)
    return {name: max(0, size) for name, size in limits.items()}


def _machine_bytes(proc: Path) -> int:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_groups(proc: Path, sys: Path) -> Iterator[int]:
    """Yield what is left of every limit of this process's memory control groups."""
    paths = dict(_group_paths(proc))
    for version, root, mount in _group_mounts(proc, sys):
        if version not in paths:
            continue
        folder = mount / _below(paths[version], root)
        if not folder.is_dir():  # in a container, the path may be that outside
            folder = mount
        while True:
            yield from _group_limits(folder, _FILES[version])
            if folder == mount:
                break
            folder = folder.parent


def _group_paths(proc: Path) -> Iterator[tuple[int, str]]:
    """Yield version and path of the process's memory control groups, from /proc/self/cgroup."""
    for line in _read(proc / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, path
        elif "memory" in controllers.split(","):
            yield 1, path


def _group_mounts(proc: Path, sys: Path) -> Iterator[tuple[int, str, Path]]:
    """Yield version, path inside the hierarchy and folder of each mount of memory groups."""
    for line in _read(proc / "self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, types = left.split(), right.split()
        if len(fields) < 5 or len(types) < 3 or not types[0].startswith("cgroup"):
            continue
        version = 2 if types[0] == "cgroup2" else 1
        if version == 1 and "memory" not in types[2].split(","):
            continue
        place = PurePosixPath(fields[4])
        inside = place.is_relative_to("/sys")
        yield version, fields[3], sys / place.relative_to("/sys") if inside else Path(place)


def _below(path: str, root: str) -> str:
    """Return the part of a group's path below the path that a mount shows, relative."""
    inner = PurePosixPath(path)
    if ".." in inner.parts:  # outside this control group namespace
        return "."
    return str(inner.relative_to(root if inner.is_relative_to(root) else "/"))


def _group_limits(folder: Path, files: _Files) -> Iterator[int]:
    """Yield what is left of the limits of one group; the file cache that it can drop is free."""
    usage = _read(folder / files.usage).strip()
    if not usage.isdigit():
        return
    rows = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if line)
    reclaimable = int(rows.get(files.reclaimable, 0))
    for name in files.limits:
        limit = _read(folder / name).strip()
        if limit.isdigit():  # "max": none
            yield int(limit) - max(0, int(usage) - reclaimable)


def _slurm_bytes(environment: Mapping[str, str]) -> int | None:
    """Return the memory of the Slurm job on this node; None without a limit."""
    mebibytes = _number(environment, "SLURM_MEM_PER_NODE")
    for part, count in (("CPU", "SLURM_CPUS_ON_NODE"), ("GPU", "SLURM_GPUS_ON_NODE")):
        each = _number(environment, f"SLURM_MEM_PER_{part}")
        mebibytes = mebibytes or each * max(1, _number(environment, count))
    return mebibytes * 2**20 or None


def _number(environment: Mapping[str, str], key: str) -> int:
    text = environment.get(key, "")
    return int(text) if text.isdigit() else 0


def _own_bytes(proc: Path, column: int) -> int:
    """Return a column of /proc/self/statm in bytes: 0 address space, 1 resident, 5 data."""
    columns = _read(proc / "self/statm").split()
    return int(columns[column]) * os.sysconf("SC_PAGE_SIZE") if column < len(columns) else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
