"""Slurm daemons of a cluster: one slurmctld on this machine, one slurmd per host, one munged.

Invariant: key, socket, configuration, logs and pid files are in the cluster's own folder; other
Slurm and munge daemons of the machine are neither used nor changed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

from dtrain.slurm.site import read_site, site_names
from tests.cluster import net

PORT, HOST_PORT = 16817, 17001
GPUS = 8


class Lacking(Exception):
    """This machine cannot run a cluster: a program is not installed, or a right is missing."""


# SchedulerParameters: a waiting job starts within a second of another's end, not within minutes.
# TmpFS per host: otherwise the PMIx plugins of several slurmd collide in one folder.
# linuxproc, task/none: no cgroups, since a container may lack them.
# cred_expire: a requeued job starts after so many seconds (Slurm's default: 120).
# SlurmdTimeout: a host whose slurmd is silent for so long is down (Slurm's default: 300).
# Features, GPUs and partitions are those of `dtrain/slurm/sites`, so that sbatch accepts jobs of
# all sites; the GPUs and most CPUs exist in this file alone.
CONFIGURATION = """\
ClusterName=dtrain
SlurmctldHost={name}({gateway})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=8
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=pmix
JobRequeue=1
KillWait=5
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 State=UP
PartitionName=idle-time Nodes=ALL PriorityTier=1 GraceTime=20 State=UP
{partitions}
"""
NODE = (
    "NodeName=n{k} NodeHostname=n{k} NodeAddr={address} Port={port} CPUs=128 RealMemory=500000 "
    "Feature=gpu,nvme Gres=gpu:{gpus}"
)
PARTITION = "PartitionName={name} Nodes=ALL PriorityTier=10 State=UP"


def taken() -> list[str]:
    """Return the obstacles to `start`, one phrase each."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", PORT))
        except OSError:
            return [f"port {PORT}"]
    return []


def configuration(folder: Path, hosts: int) -> str:
    """Return the text of slurm.conf."""
    nodes = [
        NODE.format(k=host, address=net.address(host), port=HOST_PORT, gpus=GPUS)
        for host in range(1, hosts + 1)
    ]
    partitions = {read_site(name).partition for name in site_names()} - {""}
    return CONFIGURATION.format(
        name=socket.gethostname().split(".")[0],
        gateway=net.GATEWAY,
        port=PORT,
        folder=folder,
        nodes="\n".join(nodes),
        partitions="\n".join(PARTITION.format(name=name) for name in sorted(partitions)),
    )


def start(folder: Path, hosts: int) -> None:
    """Start all daemons and wait until every host is idle.

    Raises Lacking if Slurm finds no PMIx, RuntimeError if a daemon fails.
    """
    names = [f"n{host}" for host in range(1, hosts + 1)]
    folders = ["state", "run", "log", "munge", *(f"spool/{n}" for n in names)]
    for name in (*folders, *(f"tmp/{n}" for n in names)):
        (folder / name).mkdir(parents=True)
    conf = folder / "slurm.conf"
    conf.write_text(configuration(folder, hosts))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    for gpu in range(GPUS):  # slurmd counts the devices
        (folder / f"gpu{gpu}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    start_munge(folder / "munge")
    net.call("slurmctld", "-f", str(conf))
    for host, name in enumerate(names, start=1):
        # `ip netns exec` hides the cgroup tree, so that slurmd would not start; nsenter does not.
        command = f'hostname {name} && exec slurmd -f "$0" -N {name}'
        namespace = f"--net=/run/netns/{net.space(host)}"
        net.call("nsenter", namespace, "unshare", "--uts", "sh", "-c", command, str(conf))
    settle(conf, hosts)
    if "can not load PMIx library" in (folder / "log/slurmd.n1.log").read_text():
        raise Lacking("Slurm finds no PMIx library (Debian: libpmix-dev)")


def start_munge(folder: Path) -> None:
    """Start a munged with its own key."""
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {name: f"{folder}/{name}" for name in ("key", "log", "seed")}
    options = [f"--{name}-file={path}" for name, path in files.items()]
    pid = f"--pid-file={folder.parent}/run/munged.pid"
    net.call("munged", *options, pid, f"--socket={folder}/socket")


def settle(conf: Path, hosts: int, limit_s: float = 30.0) -> None:
    """Wait until all hosts are idle."""
    deadline = time.monotonic() + limit_s
    while (states := host_states(conf)) != ["idle"] * hosts:
        if time.monotonic() > deadline:
            log = (conf.parent / "log/slurmctld.log").read_text()[-2000:]
            raise RuntimeError(f"hosts are {states} after {limit_s:.0f} s; slurmctld says:\n{log}")
        time.sleep(0.1)


def host_states(conf: Path) -> list[str]:
    """Return the state of every host, such as "idle" or "down*"; empty if slurmctld fails."""
    result = subprocess.run(
        ("sinfo", "--noheader", "--partition=main", "--Node", "--format=%T"),
        env=os.environ | {"SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result.stdout.split()
