"""Control the cluster from the command line.

python -m tests.cluster up [HOSTS] [--rate 1gbit]    start it, or change its size and rate
eval "$(python -m tests.cluster env)"                let srun and sbatch use it
python -m tests.cluster down                         remove it
"""

from __future__ import annotations

import argparse
import shlex
import sys

from tests import cluster


def main() -> str | None:
    """Run one command; return the error message, if any."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up")
    start.add_argument("hosts", nargs="?", type=int, default=4)
    start.add_argument("--rate", help="send rate of each host, such as 1gbit")
    commands.add_parser("env")
    commands.add_parser("down")
    options = parser.parse_args()
    try:
        run_command(options)
    except (cluster.Lacking, cluster.Taken, RuntimeError, ValueError) as error:
        return str(error)
    return None


def run_command(options: argparse.Namespace) -> None:
    """Run `up`, `down` or `env`."""
    if options.command == "env":
        if not (running := cluster.state()):
            raise cluster.Taken("there is no cluster: python -m tests.cluster up")
        print(f"export SLURM_CONF={shlex.quote(running.env['SLURM_CONF'])}")
        return
    with cluster.hold():
        if options.command == "down":
            cluster.down()
        else:
            cluster.up(options.hosts, options.rate)
            print(f'{options.hosts} hosts are up: eval "$({sys.executable} -m tests.cluster env)"')


if __name__ == "__main__":
    sys.exit(main())
