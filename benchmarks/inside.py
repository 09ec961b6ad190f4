"""Trains a run file on ranks that are threads of one process, on hosts of made-up names.

What is learnt and which bytes are counted do not depend on the transport, so accuracies can be had
without oversubscribed processes, two such runs beside each other. Times mean nothing here.

    python inside.py RUN.toml OUT HOST HOST ...        one host per rank, as in a a b b
"""

from __future__ import annotations

import sys
from pathlib import Path

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.config.parse import read_run
from dtrain.train import train

LIMIT_S = 7200.0


def main() -> None:
    """Train."""
    path, out, *hosts = sys.argv[1:]
    run = read_run(Path(path))
    ranks(len(hosts), lambda comm: train(run, comm, Path(out)), hosts=hosts, timeout_s=LIMIT_S)


if __name__ == "__main__":
    main()
