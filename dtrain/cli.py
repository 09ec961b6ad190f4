"""The command line: `dtrain train`, `evaluate`, `export`, `plan`, `flight` and `data import`.

Invariant: nothing here imports torch or MPI before a command needs it, and only `train` and
`evaluate` ever import MPI; a refusal is one message from one rank and its exit code, anything else
a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from dtrain.comm import launcher as launch
from dtrain.comm.flight_recorder import dump_stacks_on, print_error
from dtrain.errors import ConfigError, DtrainError, Interrupted

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm


ArgvBuilder = Callable[[argparse.Namespace], list[str]]


RankWork = Callable[[argparse.Namespace, "Comm"], None]


ABORT_DELAY_S = 0.5
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
    except DtrainError as refusal:
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
    _add_run_arguments(train)
    train.add_argument("--out", type=Path, metavar="DIR", help="run folder (runs/<run file>)")
    train.add_argument(
        "--resume", default="auto", metavar="auto|never|DIR", help="where to go on from (auto)"
    )
    _add_rank_arguments(train, _train_argv, _train)

    evaluate = commands.add_parser("evaluate", help="test the newest checkpoint of a run")
    evaluate.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    _add_overrides(evaluate, "other data: data.test=FILE.h5")
    evaluate.add_argument(
        "--split", default="test", choices=("train", "test"), help="which samples (test)"
    )
    evaluate.add_argument("--json", action="store_true", help="print plain values")
    _add_rank_arguments(evaluate, _evaluate_argv, _evaluate)

    plan = commands.add_parser("plan", help="show blocks, schedule and messages; trains nothing")
    _add_run_arguments(plan)
    plan.add_argument(
        "--ranks", type=_positive_int, required=True, metavar="N", help="ranks planned"
    )
    plan.add_argument("--json", action="store_true", help="print plain values")
    plan.add_argument(
        "--costs", type=Path, metavar="FILE.toml", help="what ranks and links cost: predict time"
    )
    plan.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the timeline")
    plan.set_defaults(command=_plan)

    flight = commands.add_parser("flight", help="say who waits for whom in a run that hangs")
    flight.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    flight.set_defaults(command=_flight)

    export = commands.add_parser("export", help="write what a run has learnt as one state dict")
    export.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    export.add_argument("out", type=Path, metavar="OUT", help="file.pt or file.safetensors")
    export.add_argument("--heads", action="store_true", help="the objective's own modules, too")
    export.add_argument("--factors", action="store_true", help="products of low rank as factors")
    export.set_defaults(command=_export)

    data = commands.add_parser("data", help="prepare data sets")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    images = verbs.add_parser("import", help="image folder, or a tar of one, to HDF5")
    images.add_argument("source", type=Path, metavar="SRC")
    images.add_argument("out", type=Path, metavar="OUT.h5")
    images.add_argument("--split", metavar="NAME", help="take only this sub-folder")
    images.set_defaults(command=_import)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a run to a command."""
    parser.add_argument("run", type=Path, metavar="RUN.toml")
    _add_overrides(parser, "override a key")


def _add_overrides(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add what overrides keys of a run."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_text)


def _add_rank_arguments(
    parser: argparse.ArgumentParser, build_argv: ArgvBuilder, work: RankWork
) -> None:
    """Make a command one of ranks: what each of them does, and the words that ask for it."""
    parser.add_argument(
        "--ranks", type=_positive_int, metavar="N", help="start N ranks on this host"
    )
    parser.set_defaults(command=_run_on_ranks, words=build_argv, work=work)


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _run_on_ranks(options: argparse.Namespace) -> int:
    """Do a command on the ranks that the launcher gave; ``--ranks`` starts them first.

    ``-P`` keeps the current folder off the import path.
    """
    if options.ranks is None:
        return _run_rank(options)
    argv = [sys.executable, "-P", "-m", "dtrain", *options.words(options)]
    argv += [word for pair in options.set for word in ("--set", pair)]
    return launch.start_ranks(options.ranks, argv, os.environ)


def _train_argv(options: argparse.Namespace) -> list[str]:
    """Return the words that ask a rank to train."""
    words = ["train", str(options.run), "--resume", options.resume]
    return words if options.out is None else [*words, "--out", str(options.out)]


def _evaluate_argv(options: argparse.Namespace) -> list[str]:
    """Return the words that ask a rank to evaluate."""
    words = ["evaluate", str(options.folder), "--split", options.split]
    return [*words, "--json"] if options.json else words


def _run_rank(options: argparse.Namespace) -> int:
    """Be one rank: refuse with all others, or do the work; end the job if this rank fails."""
    from dtrain.comm import world

    dump_stacks_on(signal.SIGUSR1)  # whoever asks while ranks start ends nothing
    comm = world()  # MPI comes before torch
    _install_signal_handlers(comm)
    try:
        options.work(options, comm)
    except DtrainError as refusal:
        if refusal.agreed and comm.rank:
            return refusal.code
        print_error(f"dtrain: {refusal.message}")
        if not refusal.agreed:
            comm.abort(refusal.code)
        return refusal.code
    except Interrupted as stop:
        if not stop.quiet:
            print_error(f"dtrain: {stop}")
        if comm.size > 1:
            time.sleep(ABORT_DELAY_S)
        comm.abort(stop.code)
    except BaseException:
        with suppress(OSError, ValueError):
            traceback.print_exc()
        comm.abort(1)
    return 0


def _train(options: argparse.Namespace, comm: Comm) -> None:
    """Train, as one rank."""
    from dtrain.comm.agree import all_or_none
    from dtrain.config.parse import read_run
    from dtrain.train import train

    run = all_or_none(comm, lambda: read_run(options.run, options.set))
    _check_launcher(run.mesh.stages, comm.size, options.run)
    train(run, comm, options.out or Path("runs") / options.run.stem, options.resume)


def _evaluate(options: argparse.Namespace, comm: Comm) -> None:
    """Evaluate, as one rank; the first one tells."""
    from dtrain.evaluate import evaluate_run
    from dtrain.monitoring.summary import evaluation_text

    found = evaluate_run(options.folder, comm, options.split, options.set)
    if comm.rank == 0:
        print(json.dumps(found, indent=2) if options.json else evaluation_text(found).rstrip())


def _install_signal_handlers(comm: Comm) -> None:
    """Write a record on SIGUSR1; on SIGINT and SIGTERM write one, then leave as on an error, so
    that the run folder is given back on the way."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):  # launchers tell twice
            signal.signal(each, signal.SIG_IGN)
        stopped = Interrupted(number, quiet=comm.rank > 0)
        if comm.flight.folder is not None:  # before the waits that it tells of unwind
            comm.flight.dump(f"Stopped: {stopped}", frame)
        raise stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    comm.flight.dump_on_signal(signal.SIGUSR1)


def _check_launcher(stages: int | None, ranks: int, run_file: Path) -> None:
    """Refuse several stages where nobody started several ranks."""
    if (
        ranks == 1
        and stages is not None
        and stages > 1
        and launch.detect_launcher(os.environ) is None
    ):
        raise ConfigError(
            "todo.key",
            f"{run_file} asks for {stages} stages, and no launcher started ranks; on this host type\n"
            f"    dtrain train {run_file} --ranks {stages}\n"
            f"or in a Slurm job\n"
            f"    srun --mpi=pmix -n {stages} dtrain train {run_file}",
        )


def _plan(options: argparse.Namespace) -> int:
    """Print what `train` would do."""
    from dtrain.config.parse import read_run
    from dtrain.planning import cost_file as costs
    from dtrain.planning import report
    from dtrain.planning.plan import make_plan

    sheet = None if options.costs is None else costs.read_cost_file(options.costs)
    planned = make_plan(read_run(options.run, options.set), options.ranks)
    if options.plot is not None:
        _write_file(options.plot, report.plan_svg(planned, sheet))
    if options.json:
        print(json.dumps(report.plan_table(planned, sheet), indent=2))
    else:
        print(report.plan_text(planned, sheet), end="")
    return 0


def _write_file(path: Path, text: str) -> None:
    """Write a file that was asked for; refuse where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "todo.key", f"cannot write {path}: {error.strerror}; choose another file"
        ) from error


def _flight(options: argparse.Namespace) -> int:
    """Print who waits for whom."""
    from dtrain.monitoring.hang_report import hang_report

    print("\n".join(hang_report(options.folder)))
    return 0


def _export(options: argparse.Namespace) -> int:
    """Write a state dict and say what is in it."""
    from dtrain.checkpoint.export import export

    state = export(options.folder, options.out, options.heads, options.factors)
    count = sum(tensor.numel() for tensor in state.values())
    print(f"{options.out}: {len(state)} tensors, {count:,} numbers")
    return 0


def _import(options: argparse.Namespace) -> int:
    """Turn images into HDF5 and say where they lie."""
    from dtrain.data.import_images import import_images

    for path in import_images(options.source, options.out, options.split):
        print(path)
    return 0
