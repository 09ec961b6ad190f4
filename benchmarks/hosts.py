"""Slurm hosts for benchmarks: network namespaces of this machine, with links of a limited rate.

Invariant: a benchmark holds the machine's only cluster while it runs, and removes it afterwards.

::

    host 1   rank 0  rank 1          shared memory inside a host, TCP between hosts;
               |                     a host sends at `rate`, and receives as much at the same time
             eth0
               |  rate
             eth0
               |
    host 2   rank 2  rank 3
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from bench import MALLOC_ENVIRONMENT, PEERS, last_record, run_program
from record import ROOT

sys.path.append(str(ROOT))  # for the cluster of the tests
from tests import cluster
from tests.cluster import net

LIMIT_MIN = 35
"""Slurm ends a longer job: it hangs."""

PORT = 29511


@final
class Hosts:
    """Running Slurm hosts.

    Parameters
    ----------
    count, ranks_per_host : int
        Hosts, and ranks of each.
    """

    def __init__(self, count: int, ranks_per_host: int) -> None:
        self.count, self.ranks_per_host = count, ranks_per_host

    def set_rate(self, rate: str | None) -> None:
        """Limit the rate at which each host sends, in tc's notation ("1gbit"); None: no limit."""
        self._environment = cluster.up(self.count, rate).env

    def bytes_sent(self) -> int:
        """Return the bytes sent by the interfaces between hosts, headers included."""
        names = (net.space(host) for host in range(1, self.count + 1))
        texts = (net.call("ip", "-n", n, "-j", "-s", "link", "show", "eth0") for n in names)
        return sum(int(json.loads(text)[0]["stats64"]["tx"]["bytes"]) for text in texts)

    def run(self, command: Sequence[str], folder: Path, capture: bool = False) -> str:
        """Run a program on all ranks with one thread each, to its end; see `run_program`."""
        ranks = self.count * self.ranks_per_host
        srun = ["srun", "--mpi=pmix", f"-N{self.count}", f"-n{ranks}", "--kill-on-bad-exit=1"]
        srun += [f"--ntasks-per-node={self.ranks_per_host}", f"--time={LIMIT_MIN}"]
        variables = {"SLURM_CONF": self._environment["SLURM_CONF"]}
        return run_program([*srun, *command], folder, 1, capture=capture, variables=variables)

    def run_peer(self, script: str, *arguments: object) -> dict[str, Any]:
        """Run `peers/SCRIPT.py` on all ranks; return the figures of its last line."""
        rendezvous = [f"MASTER_ADDR={net.address(1)}", f"MASTER_PORT={PORT}"]
        command = ["env", *MALLOC_ENVIRONMENT, *rendezvous, "GLOO_SOCKET_IFNAME=eth0"]
        command += [sys.executable, str(PEERS / f"{script}.py"), *map(str, arguments)]
        return last_record(self.run(command, ROOT, capture=True))


@contextmanager
def start_hosts(count: int, ranks_per_host: int) -> Iterator[Hosts]:
    """Run `count` hosts of `ranks_per_host` ranks for the length of a block, without a rate."""
    # Slurm passes the environment of the submitting process to the ranks.
    os.environ.pop("SLURM_CONF", None)
    with cluster.cluster(count):
        hosts = Hosts(count, ranks_per_host)
        hosts.set_rate(None)
        yield hosts
