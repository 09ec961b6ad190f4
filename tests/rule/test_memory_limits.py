"""The available memory is the least of all limits that hold for a process."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from dtrain.data import memory_limits
from dtrain.data.memory_limits import available_bytes

MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
MOUNT_1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
MOUNT_2 = "41 31 0:38 {root} /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate"
UNLIMITED_1 = 9223372036854771712


class Machine:
    """Folders in the place of /proc and /sys."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys"
        self.write("proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n")
        self.write("proc/self/statm", "3000 200 100 1 0 1000 0\n")

    def write(self, path: str, text: object) -> None:
        file = self.proc.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(text))

    def group_1(self, path: str, limit: int, usage: int, inactive: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory/{path}"
        self.write(f"{folder}/memory.limit_in_bytes", limit)
        self.write(f"{folder}/memory.usage_in_bytes", usage)
        self.write(f"{folder}/memory.stat", f"inactive_file 7\ntotal_inactive_file {inactive}\n")

    def group_2(self, path: str, limit: object, usage: int, inactive: int = 0) -> None:
        folder = f"sys/fs/cgroup/{path}"
        self.write(f"{folder}/memory.max", limit)
        self.write(f"{folder}/memory.current", usage)
        self.write(f"{folder}/memory.stat", f"anon 5\ninactive_file {inactive}\n")

    def process(self, groups: str, *mounts: str) -> None:
        self.write("proc/self/cgroup", groups)
        self.write("proc/self/mountinfo", "\n".join(mounts))

    def available(self, **environment: str) -> int:
        return available_bytes(self.proc, self.sys, environment)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_limit_the_kernel_knows(machine: Machine) -> None:
    assert machine.available() == 8192 * MIB


def test_without_proc_it_is_the_memory_of_the_machine(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path, {}) == os.sysconf("SC_PHYS_PAGES") * PAGE


@pytest.mark.parametrize("limited", ["", "a", "a/b"])
def test_the_limit_of_a_parent_holds(machine: Machine, limited: str) -> None:
    """Version 2: "max" is no limit, and the root of the hierarchy has no files."""
    machine.process("0::/a/b\n", MOUNT_2.format(root="/"))
    for path in ("a", "a/b"):
        machine.group_2(path, "max", 300 * MIB)
    machine.group_2(limited, 1000 * MIB, 300 * MIB, 50 * MIB)
    assert machine.available() == 750 * MIB


@pytest.mark.parametrize("limited", ["", "slurm", "slurm/job"])
def test_version_one_counts_the_cache_of_children(machine: Machine, limited: str) -> None:
    machine.process("5:cpu:/\n4:hugetlb,memory:/slurm/job\n0::/\n", MOUNT_1.format(root="/"))
    for path in ("", "slurm", "slurm/job"):
        machine.group_1(path, UNLIMITED_1, 300 * MIB)
    machine.group_1(limited, 1000 * MIB, 300 * MIB, 50 * MIB)
    assert machine.available() == 750 * MIB


@pytest.mark.parametrize("path", ["/docker/1f", "/docker/1f/a", "/", "/elsewhere", "/../x"])
def test_a_container_shows_its_own_group_as_the_root(machine: Machine, path: str) -> None:
    """The path in /proc/self/cgroup may be that outside, inside or none that exists here."""
    machine.process(f"4:memory:{path}\n", MOUNT_1.format(root="/docker/1f"))
    machine.group_1("", 1000 * MIB, 300 * MIB)
    assert machine.available() == 700 * MIB


def test_a_group_below_the_mounted_one_is_found(machine: Machine) -> None:
    machine.process("4:memory:/docker/1f/a\n", MOUNT_1.format(root="/docker/1f"))
    machine.group_1("", 1000 * MIB, 300 * MIB)
    machine.group_1("a", 500 * MIB, 300 * MIB)
    assert machine.available() == 200 * MIB


def test_both_versions_count(machine: Machine) -> None:
    both = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    machine.process("4:memory:/a\n0::/b\n", MOUNT_1.format(root="/"), both)
    machine.group_1("a", 1000 * MIB, 0)
    machine.group_2("unified/b", 900 * MIB, 0)
    assert machine.available() == 900 * MIB


def test_pressure_begins_at_the_high_mark(machine: Machine) -> None:
    machine.process("0::/a\n", MOUNT_2.format(root="/"))
    machine.group_2("a", 1000 * MIB, 300 * MIB)
    machine.write("sys/fs/cgroup/a/memory.high", 600 * MIB)
    assert machine.available() == 300 * MIB


def test_a_group_above_its_limit_has_nothing_left(machine: Machine) -> None:
    machine.process("0::/a\n", MOUNT_2.format(root="/"))
    machine.group_2("a", 100 * MIB, 300 * MIB)
    assert machine.available() == 0


@pytest.mark.parametrize(
    ("environment", "mebibytes"),
    [
        ({"SLURM_MEM_PER_NODE": "4000"}, 4000),
        ({"SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "6"}, 3000),
        ({"SLURM_MEM_PER_GPU": "700", "SLURM_GPUS_ON_NODE": "2"}, 1400),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_MEM_PER_CPU": "0"}, None),
        ({"SLURM_MEM_PER_NODE": "many"}, None),
    ],
)
def test_a_job_of_slurm_has_a_limit(
    machine: Machine, environment: dict[str, str], mebibytes: int | None
) -> None:
    """The memory of the process counts against it; 0 is no limit."""
    left = 8192 * MIB if mebibytes is None else mebibytes * MIB - 200 * PAGE
    assert machine.available(**environment) == left


@pytest.mark.parametrize(("kind", "pages"), [("RLIMIT_AS", 3000), ("RLIMIT_DATA", 1000)])
def test_limits_of_the_process_count(
    machine: Machine, kind: str, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = getattr(resource, kind)
    monkeypatch.setattr(
        memory_limits.resource,
        "getrlimit",
        lambda k: (100 * MIB if k == limited else resource.RLIM_INFINITY,) * 2,
    )
    assert machine.available() == 100 * MIB - pages * PAGE
