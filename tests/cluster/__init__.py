"""A real Slurm cluster of several hosts on one machine, for tests and benchmarks.

Hosts are network namespaces (`tests.cluster.net`), on which an unchanged Slurm runs
(`tests.cluster.slurm`)::

    with cluster(hosts=4, rate="1gbit") as slurm:
        subprocess.run(["srun", "--mpi=pmix", "-N4", "-n4", ...], env=slurm.env)

or by hand: `python -m tests.cluster up 4`, `eval "$(python -m tests.cluster env)"`, `... down`.

Invariant: there is one cluster per machine. A state file describes it; it is written first and
deleted last. After a crash the state file therefore marks the remains as ours, and `up` and `down`
remove them. Without a state file, objects with our names belong to another program, and `up`
refuses to start.

Needs Linux, root, iproute2, munge and Slurm with PMIx; `Lacking` names the missing part. `hold`
locks the cluster for one user at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster import net, slurm
from tests.cluster.slurm import Lacking as Lacking

FOLDER = Path(tempfile.gettempdir()).resolve() / "dtrain-cluster"
STATE = FOLDER.with_suffix(".json")
TOOLS = ("ip", "tc", "nsenter", "unshare", "munged", "slurmctld", "slurmd", "srun", "sinfo")


class Taken(Exception):
    """Another program uses the cluster's lock, or its names, addresses or port."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up.

    Parameters
    ----------
    hosts : int
        Number of hosts, named n1, n2, ...
    rate : str or None
        Send rate of each host in tc's notation ("1gbit"); None: no limit.
    boot : str
        The boot id of the machine. After a reboot there are no processes or links to remove.
    """

    hosts: int
    rate: str | None
    boot: str

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm commands use this cluster."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return environ | {"SLURM_CONF": str(FOLDER / "slurm.conf")}


def check() -> None:
    """Raise Lacking if this machine cannot run a cluster."""
    if os.geteuid() != 0:
        raise Lacking("a cluster of network namespaces needs root")
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise Lacking(f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge iproute2)")
    probe = subprocess.run(("unshare", "--net", "--uts", "true"), capture_output=True, timeout=60)
    if probe.returncode:
        raise Lacking("this machine does not allow network namespaces")


@contextmanager
def hold(wait_s: float = 0.0) -> Iterator[None]:
    """Lock the cluster for the length of a block; raise Taken if another process keeps the lock."""
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW
    lock = os.open(FOLDER.with_suffix(".lock"), flags, 0o600)
    deadline = time.monotonic() + wait_s
    try:
        while not try_lock(lock):
            if time.monotonic() >= deadline:
                raise Taken(f"the cluster is in use by process {os.pread(lock, 20, 0).decode()}")
            time.sleep(0.2)
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


def try_lock(lock: int) -> bool:
    """Try to acquire a file lock; return whether it succeeded."""
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextmanager
def cluster(hosts: int = 4, rate: str | None = None) -> Iterator[Cluster]:
    """Run a cluster for the length of a block; wait up to five minutes for the lock."""
    with hold(wait_s=300.0):
        try:
            yield up(hosts, rate)
        finally:
            down()


def up(hosts: int = 4, rate: str | None = None) -> Cluster:
    """Return a working cluster: the running one if it has that size, else a new one.

    The caller holds the lock. Raises Lacking if the machine cannot run a cluster, Taken if another
    program uses its names, addresses or port, RuntimeError if a command fails; no part of
    the new cluster remains then.
    """
    check()
    if not 1 <= hosts <= net.MAX_HOSTS:
        raise ValueError(f"{hosts} hosts: choose 1 to {net.MAX_HOSTS}")
    requested = Cluster(hosts, rate, boot_id())
    if not (running := state()) or running.hosts != hosts or not is_healthy(running):
        down()
        return build(requested)
    net.shape(hosts, rate)
    STATE.write_text(json.dumps(asdict(requested)))
    return requested


def build(requested: Cluster) -> Cluster:
    """Build a cluster; raise Taken if another program uses its names, addresses or port."""
    folder = [f"folder {FOLDER}"] if FOLDER.exists() else []
    if conflicts := net.taken() + slurm.taken() + host_name_conflicts(requested.hosts) + folder:
        raise Taken(
            f"not ours, and in the way of a cluster: {', '.join(conflicts)}; remove them first"
        )
    STATE.write_text(json.dumps(asdict(requested)))
    try:
        # munge requires execute permission for all on the folder of its socket.
        FOLDER.mkdir(mode=0o711)
        net.build(requested.hosts)
        net.shape(requested.hosts, requested.rate)
        slurm.start(FOLDER, requested.hosts)
    except BaseException:
        down()
        raise
    return requested


def down() -> None:
    """Remove the cluster, or the remains of a crash; do nothing if there is none."""
    if not (running := state()):
        return
    if running.boot == boot_id():
        end_processes(daemons())
        end_processes(net.pids())
        net.remove()
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    STATE.unlink()


def state() -> Cluster | None:
    """Return the cluster that runs, or ran before a crash; None without a state file of ours."""
    with suppress(FileNotFoundError):
        if STATE.lstat().st_uid == os.geteuid():
            return Cluster(**json.loads(STATE.read_text()))
    return None


def is_healthy(cluster: Cluster) -> bool:
    """Return whether all daemons run and all hosts accept jobs."""
    if len(daemons()) != cluster.hosts + 2:  # sinfo would take most of a minute to fail
        return False
    usable = {"idle", "mixed", "allocated", "completing"}
    states = slurm.host_states(FOLDER / "slurm.conf")
    return len(states) == cluster.hosts and usable.issuperset(states)


def daemons() -> list[int]:
    """Return the running daemons: the pid files' processes whose command line has our folder."""
    files = (FOLDER / "run").glob("*.pid")
    pids = (int(text) for file in files if (text := file.read_text().strip()).isdigit())
    return [pid for pid in pids if os.fsencode(FOLDER) in command(pid)]


def command(pid: int) -> bytes:
    """Return a process's command line; empty if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def end_processes(pids: list[int], grace_s: float = 1.0) -> None:
    """End processes with SIGTERM, then with SIGKILL after `grace_s`."""
    for kind, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, kind)
        deadline = time.monotonic() + wait_s
        while pids and time.monotonic() < deadline:
            time.sleep(0.05)
            pids = [pid for pid in pids if command(pid)]


def host_name_conflicts(hosts: int) -> list[str]:
    """Return our host names that /etc/hosts maps to another address."""
    addresses = {f"n{host}": net.address(host) for host in range(1, hosts + 1)}
    rows = [line.split("#")[0].split() for line in Path("/etc/hosts").read_text().splitlines()]
    return [
        f"host name {name} ({row[0]} in /etc/hosts)"
        for row in rows
        for name in row[1:]
        if name in addresses and row[0] != addresses[name]
    ]


def boot_id() -> str:
    """Return the id of the machine's current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
