"""The cluster by hand.

python -m tests.cluster up [HOSTS] [--rate 1gbit]    start it, or bring it to this shape
eval "$(python -m tests.cluster env)"                make srun and its like use it
python -m tests.cluster down                         remove it
"""

from __future__ import annotations

import argparse
import shlex
import sys

from tests import cluster


def main() -> str | None:
    """Run one command; return what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up")
    start.add_argument("hosts", nargs="?", type=int, default=4)
    start.add_argument("--rate", help="what each host can send, such as 1gbit")
    commands.add_parser("env")
    commands.add_parser("down")
    asked = parser.parse_args()
    try:
        obey(asked)
    except (cluster.Lacking, cluster.Taken, RuntimeError, ValueError) as fault:
        return str(fault)
    return None


def obey(asked: argparse.Namespace) -> None:
    """Do what was asked."""
    if asked.command == "env":
        if not (present := cluster.state()):
            raise cluster.Taken("there is no cluster: python -m tests.cluster up")
        print(f"export SLURM_CONF={shlex.quote(present.env['SLURM_CONF'])}")
        return
    with cluster.hold():
        if asked.command == "down":
            cluster.down()
        else:
            cluster.up(asked.hosts, asked.rate)
            print(f'{asked.hosts} hosts are up: eval "$({sys.executable} -m tests.cluster env)"')


if __name__ == "__main__":
    sys.exit(main())
