"""The command line: `dtrain train`, `dtrain plan`, `dtrain flight`, `dtrain data import`.

Invariant: nothing here imports torch or MPI before a command needs it, and only `train` ever
imports MPI; a refusal is one message from one rank and its exit code, anything else a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from dtrain.comm import launch
from dtrain.errors import Refusal, Stopped
from dtrain.telemetry import attend, say

if TYPE_CHECKING:
    from dtrain.comm.comm import Comm

GRACE_S = 0.5
"""How long the rank that was stopped first lets the others write what they did; mpirun kills them
about a second after its SIGTERM."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    0 done, 2 usage, 3 data, 4 numeric, 128 + n ended by signal n, 1 other.
    """
    options = _parser().parse_args(argv)
    try:
        code: int = options.command(options)
        return code
    except Refusal as refusal:
        print(f"dtrain: {refusal.message}", file=sys.stderr)
        return refusal.code
    except KeyboardInterrupt:
        print("dtrain: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="dtrain", description="MPI-distributed local learning")
    parser.add_argument("--version", action="version", version=f"dtrain {version('dtrain')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train what a run file describes")
    _run(train)
    train.add_argument("--out", type=Path, metavar="DIR", help="run folder (runs/<run file>)")
    train.add_argument("--ranks", type=_positive, metavar="N", help="start N ranks on this host")
    train.add_argument(
        "--resume", default="auto", metavar="auto|never|DIR", help="where to go on from (auto)"
    )
    train.set_defaults(command=_train)

    plan = commands.add_parser("plan", help="show blocks, schedule and messages; trains nothing")
    _run(plan)
    plan.add_argument("--ranks", type=_positive, required=True, metavar="N", help="ranks planned")
    plan.add_argument("--json", action="store_true", help="print plain values")
    plan.add_argument(
        "--costs", type=Path, metavar="FILE.toml", help="what ranks and links cost: predict time"
    )
    plan.set_defaults(command=_plan)

    flight = commands.add_parser("flight", help="say who waits for whom in a run that hangs")
    flight.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    flight.set_defaults(command=_flight)

    data = commands.add_parser("data", help="prepare data sets")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    images = verbs.add_parser("import", help="image folder, or a tar of one, to HDF5")
    images.add_argument("source", type=Path, metavar="SRC")
    images.add_argument("out", type=Path, metavar="OUT.h5")
    images.add_argument("--split", metavar="NAME", help="take only this sub-folder")
    images.set_defaults(command=_import)
    return parser


def _run(parser: argparse.ArgumentParser) -> None:
    """Add what names a run to a command."""
    parser.add_argument("run", type=Path, metavar="RUN.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key"
    )


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not at least 1")
    return number


def _train(options: argparse.Namespace) -> int:
    """Train on the ranks that the launcher gave; ``--ranks`` starts them first."""
    if options.ranks is None:
        return _work(options)
    return launch.start(options.ranks, _worker(options), os.environ)


def _worker(options: argparse.Namespace) -> list[str]:
    """Return the command of one rank; ``-P`` keeps the current folder off the import path."""
    words = [sys.executable, "-P", "-m", "dtrain", "train", str(options.run)]
    words += ["--resume", options.resume]
    words += [word for pair in options.set for word in ("--set", pair)]
    return words if options.out is None else [*words, "--out", str(options.out)]


def _work(options: argparse.Namespace) -> int:
    """Be one rank: refuse with all others, or train; end the job if this rank fails."""
    from dtrain.comm import world

    attend(signal.SIGUSR1)  # whoever asks while ranks start ends nothing
    comm = world()  # MPI comes before torch
    _listen(comm)
    try:
        from dtrain.config import read
        from dtrain.job import together
        from dtrain.train import train

        run = together(comm, lambda: read(options.run, options.set))
        _launched(run.mesh.stages, comm.size, options.run)
        train(run, comm, options.out or Path("runs") / options.run.stem, options.resume)
    except Refusal as refusal:
        if refusal.agreed and comm.rank:
            return refusal.code
        say(f"dtrain: {refusal.message}")
        if not refusal.agreed:
            comm.abort(refusal.code)
        return refusal.code
    except Stopped as stop:
        if not stop.quiet:
            say(f"dtrain: {stop}")
        if comm.size > 1:
            time.sleep(GRACE_S)
        comm.abort(stop.code)
    except BaseException:
        with suppress(OSError, ValueError):
            traceback.print_exc()
        comm.abort(1)
    return 0


def _listen(comm: Comm) -> None:
    """Write a record on SIGUSR1; on SIGINT and SIGTERM write one, then leave as on an error, so
    that the run folder is given back on the way."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):  # launchers tell twice
            signal.signal(each, signal.SIG_IGN)
        stopped = Stopped(number, quiet=comm.rank > 0)
        if comm.flight.folder is not None:  # before the waits that it tells of unwind
            comm.flight.dump(f"Stopped: {stopped}", frame)
        raise stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    comm.flight.listen(signal.SIGUSR1)


def _launched(stages: int | None, ranks: int, run: Path) -> None:
    """Refuse several stages where nobody started several ranks."""
    if ranks == 1 and stages is not None and stages > 1 and launch.launched(os.environ) is None:
        raise Refusal(
            f"{run} asks for {stages} stages, and no launcher started ranks; on this host type\n"
            f"    dtrain train {run} --ranks {stages}\n"
            f"or in a Slurm job\n"
            f"    srun --mpi=pmix -n {stages} dtrain train {run}"
        )


def _plan(options: argparse.Namespace) -> int:
    """Print what `train` would do."""
    from dtrain import costs, report
    from dtrain.config import read
    from dtrain.job import plan

    sheet = None if options.costs is None else costs.read(options.costs)
    planned = plan(read(options.run, options.set), options.ranks)
    if options.json:
        print(json.dumps(report.plan_table(planned, sheet), indent=2))
    else:
        print(report.plan_text(planned, sheet), end="")
    return 0


def _flight(options: argparse.Namespace) -> int:
    """Print who waits for whom."""
    from dtrain.flights import told

    print("\n".join(told(options.folder)))
    return 0


def _import(options: argparse.Namespace) -> int:
    """Turn images into HDF5 and say where they lie."""
    from dtrain.data.importing import import_images

    for path in import_images(options.source, options.out, options.split):
        print(path)
    return 0
