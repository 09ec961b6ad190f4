"""A real Slurm cluster of several hosts on one machine, for tests and benchmarks.

Hosts are network namespaces (`tests.cluster.net`), on which an unchanged Slurm runs
(`tests.cluster.slurm`)::

    with cluster(hosts=4, rate="1gbit") as slurm:
        subprocess.run(["srun", "--mpi=pmix", "-N4", "-n4", ...], env=slurm.env)

or by hand: `python -m tests.cluster up 4`, `eval "$(python -m tests.cluster env)"`, `... down`.

Invariant: one cluster per machine, described by a state file, which is written before anything
else is made and deleted after everything else is gone. So whatever a crash left
behind is known to be ours, and `up` and `down` remove it; what bears our names without that
file is somebody else's, and is refused.

Needs Linux, root, iproute2, munge and Slurm with PMIx; `Lacking` says what a machine lacks.
Users of the cluster take turns: `hold` is the lock.
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
    """Something that is not ours has the cluster's names, addresses, port or turn."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up.

    Parameters
    ----------
    hosts : int
        Their names are n1, n2, ...
    rate : str or None
        What each host can send, in tc's words; None: as fast as the machine.
    boot : str
        The machine's boot that it belongs to: after another one nothing of it is left to remove.
    """

    hosts: int
    rate: str | None
    boot: str

    @property
    def env(self) -> dict[str, str]:
        """The environment in which srun, sbatch and their like speak to this cluster."""
        mine = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return mine | {"SLURM_CONF": str(FOLDER / "slurm.conf")}


def check() -> None:
    """Raise Lacking where this machine cannot have a cluster."""
    if os.geteuid() != 0:
        raise Lacking("a cluster of network namespaces needs root")
    if lacking := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise Lacking(f"not installed: {', '.join(lacking)} (Debian: slurm-wlm munge iproute2)")
    probe = subprocess.run(("unshare", "--net", "--uts", "true"), capture_output=True, timeout=60)
    if probe.returncode:
        raise Lacking("this machine does not allow network namespaces")


@contextmanager
def hold(wait_s: float = 0.0) -> Iterator[None]:
    """Have the machine's one cluster to oneself; Taken after waiting in vain."""
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW
    lock = os.open(FOLDER.with_suffix(".lock"), flags, 0o600)
    deadline = time.monotonic() + wait_s
    try:
        while not locked(lock):
            if time.monotonic() >= deadline:
                raise Taken(f"the cluster is in use by process {os.pread(lock, 20, 0).decode()}")
            time.sleep(0.2)
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


def locked(lock: int) -> bool:
    """Try to take a lock."""
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextmanager
def cluster(hosts: int = 4, rate: str | None = None) -> Iterator[Cluster]:
    """Have a cluster for the length of a block, waiting for one's turn for up to five minutes."""
    with hold(wait_s=300.0):
        try:
            yield up(hosts, rate)
        finally:
            down()


def up(hosts: int = 4, rate: str | None = None) -> Cluster:
    """Return a working cluster: the present one if it is of that size, else a new one.

    Raises Lacking where the machine cannot have one, Taken where something else has its names,
    addresses or port, RuntimeError where a command fails; nothing is left behind then. The
    caller holds the lock.
    """
    check()
    if not 1 <= hosts <= net.MOST:
        raise ValueError(f"{hosts} hosts: choose 1 to {net.MOST}")
    asked = Cluster(hosts, rate, boot())
    if not (present := state()) or present.hosts != hosts or not alive(present):
        down()
        return anew(asked)
    net.shape(hosts, rate)
    STATE.write_text(json.dumps(asdict(asked)))
    return asked


def anew(asked: Cluster) -> Cluster:
    """Build a cluster where there is none."""
    folder = [f"folder {FOLDER}"] if FOLDER.exists() else []
    if others := net.taken() + slurm.taken() + named(asked.hosts) + folder:
        raise Taken(
            f"not ours, and in the way of a cluster: {', '.join(others)}; remove them first"
        )
    STATE.write_text(json.dumps(asdict(asked)))
    try:
        # Open to all for passing through: munge demands it of its socket's folder.
        FOLDER.mkdir(mode=0o711)
        net.build(asked.hosts)
        net.shape(asked.hosts, asked.rate)
        slurm.start(FOLDER, asked.hosts)
    except BaseException:
        down()
        raise
    return asked


def down() -> None:
    """Remove the cluster, whole or what a crash left of it; nothing to remove is no error."""
    if not (present := state()):
        return
    if present.boot == boot():
        end(daemons())
        end(net.pids())
        net.raze()
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    STATE.unlink()


def state() -> Cluster | None:
    """Return the cluster that is up, or was before a crash; None where there is nothing of ours."""
    with suppress(FileNotFoundError):
        if STATE.lstat().st_uid == os.geteuid():
            return Cluster(**json.loads(STATE.read_text()))
    return None


def alive(present: Cluster) -> bool:
    """Whether all daemons run and all hosts can be given work."""
    if len(daemons()) != present.hosts + 2:  # asking Slurm would take it most of a minute
        return False
    fit = {"idle", "mixed", "allocated", "completing"}
    states = slurm.survey(FOLDER / "slurm.conf")
    return len(states) == present.hosts and fit.issuperset(states)


def daemons() -> list[int]:
    """Return our living daemons: those in pid files whose command line names our folder."""
    files = (FOLDER / "run").glob("*.pid")
    pids = (int(text) for file in files if (text := file.read_text().strip()).isdigit())
    return [pid for pid in pids if os.fsencode(FOLDER) in command(pid)]


def command(pid: int) -> bytes:
    """Return a process's command line; empty where it is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def end(pids: list[int], grace_s: float = 1.0) -> None:
    """End processes: politely, and by force after a while; nothing that they save is needed."""
    for kind, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, kind)
        deadline = time.monotonic() + wait_s
        while pids and time.monotonic() < deadline:
            time.sleep(0.05)
            pids = [pid for pid in pids if command(pid)]


def named(hosts: int) -> list[str]:
    """Return host names of ours that /etc/hosts gives to another address."""
    ours = {f"n{host}": net.address(host) for host in range(1, hosts + 1)}
    rows = [line.split("#")[0].split() for line in Path("/etc/hosts").read_text().splitlines()]
    return [
        f"host name {name} ({row[0]} in /etc/hosts)"
        for row in rows
        for name in row[1:]
        if name in ours and row[0] != ours[name]
    ]


def boot() -> str:
    """Return the name of the machine's present boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
