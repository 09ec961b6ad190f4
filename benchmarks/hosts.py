"""Slurm hosts for benchmarks: network namespaces of this machine, whose links have a rate.

Invariant: the machine's one cluster is ours while it is used, and is gone afterwards.

::

    host 1   rank 0  rank 1          shared memory inside a host, TCP between hosts;
               |                     a host sends `rate`, and receives as much at the same time
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

from bench import KEEPING, PEERS, call
from record import ROOT

sys.path.append(str(ROOT))  # where the cluster of the tests lies
from tests import cluster
from tests.cluster import net

LIMIT_MIN = 35
"""Slurm ends what takes longer, which hangs."""

PORT = 29511


@final
class Hosts:
    """Hosts that are up.

    Parameters
    ----------
    count, each : int
        Hosts, and ranks of each.
    """

    def __init__(self, count: int, each: int) -> None:
        self.count, self.each = count, each

    def shape(self, rate: str | None) -> None:
        """Bound what each host sends, in words of tc such as "1gbit"; None: no bound."""
        self._env = cluster.up(self.count, rate).env

    def sent(self) -> int:
        """Return the bytes that the interfaces between hosts have sent, headers included."""
        spaces = (net.space(host) for host in range(1, self.count + 1))
        texts = (net.call("ip", "-n", s, "-j", "-s", "link", "show", "eth0") for s in spaces)
        return sum(int(json.loads(text)[0]["stats64"]["tx"]["bytes"]) for text in texts)

    def start(self, words: Sequence[str], folder: Path, quiet: bool = False) -> str:
        """Run a program on all ranks, one thread each, to its end; return what it printed."""
        ranks = self.count * self.each
        srun = ["srun", "--mpi=pmix", f"-N{self.count}", f"-n{ranks}", "--kill-on-bad-exit=1"]
        srun += [f"--ntasks-per-node={self.each}", f"--time={LIMIT_MIN}"]
        slurm = {"SLURM_CONF": self._env["SLURM_CONF"]}
        return call([*srun, *words], folder, 1, quiet=quiet, more=slurm)

    def peer(self, script: str, *words: object) -> dict[str, Any]:
        """Return the figures that `peers/SCRIPT.py` prints as its last line."""
        meeting = [f"MASTER_ADDR={net.address(1)}", f"MASTER_PORT={PORT}"]
        program = ["env", *KEEPING, *meeting, "GLOO_SOCKET_IFNAME=eth0", sys.executable]
        program += [str(PEERS / f"{script}.py"), *map(str, words)]
        return dict(json.loads(self.start(program, ROOT, quiet=True).strip().splitlines()[-1]))


@contextmanager
def hosts(count: int, each: int) -> Iterator[Hosts]:
    """Have `count` hosts of `each` ranks for the length of a block; rates are off at first."""
    # Slurm gives ranks the variables of whoever starts them.
    os.environ.pop("SLURM_CONF", None)
    with cluster.cluster(count):
        told = Hosts(count, each)
        told.shape(None)
        yield told
