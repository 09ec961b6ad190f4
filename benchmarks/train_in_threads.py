"""Train a run file on ranks that are threads of one process, with made-up host names.

Accuracies and counted bytes do not depend on the transport. Threads measure them without
oversubscribed processes, also for two runs at once. Times are meaningless here.

    python train_in_threads.py RUN.toml OUT HOST HOST ...      one host per rank, as in a a b b
"""

from __future__ import annotations

import sys
from pathlib import Path

from dtrain.comm.backends.threads import run_ranks
from dtrain.config.parse import read_run
from dtrain.training import train

TIMEOUT_S = 7200.0


def main() -> None:
    """Train the run file of the command line."""
    path, out, *hosts = sys.argv[1:]
    run = read_run(Path(path))
    run_ranks(
        len(hosts), lambda comm: train(run, comm, Path(out)), hosts=hosts, timeout_s=TIMEOUT_S
    )


if __name__ == "__main__":
    main()
