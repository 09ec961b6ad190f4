"""The command line: `dtrain train`, `run`, `evaluate`, `predict`, `export`, `plan` and others.

Invariant: a command imports torch or MPI only when it needs it, and only `train`, `run`,
`evaluate`, `predict` and `doctor` import MPI. Commands call the functions of `import dtrain`. A
`DtrainError` is one message from one rank and its exit code; any other exception is a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import dtrain
from dtrain import cli_checkpoint, cli_data, cli_doctor, cli_run_folders, cli_submit, cli_sweep
from dtrain.comm.launcher import start_ranks
from dtrain.comm.launcher_detection import detect_launcher
from dtrain.errors import ConfigError, DtrainError
from dtrain.paths import expand_options

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


ArgvBuilder = Callable[[argparse.Namespace], list[str]]


RankWork = Callable[[argparse.Namespace, "Comm"], int | None]
"""Returns an exit code where it is not 0."""


PATH_TEXTS = ("resume", "data", "site", "container", "environment_archive")
"""Options that are texts, and may be paths: `$VAR` and `~` are replaced in all paths."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    Returns
    -------
    int
        0 done; 1 another exception; 2 usage, run file or mesh; 3 data; 4 a loss or weight is NaN or
        infinite; 5 a checkpoint is damaged or incomplete; 6 ranks hang; 7 a rank was lost;
        75 saved and stopped early; 128 + n ended at once by signal n.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own_words, script_words = _split_script_words(words)
    options = _parser().parse_args(own_words)
    options.arguments = script_words
    try:
        expand_options(options, PATH_TEXTS)
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except DtrainError as error:
        print(f"dtrain: {error.text_with_key()}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("dtrain: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _split_script_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of dtrain, and those after ``--``, which belong to the script of `run`."""
    if words[:1] != ["run"] or "--" not in words:
        return words, []
    end = words.index("--")
    return words[:end], words[end + 1 :]


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="dtrain", description="MPI-distributed local learning")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_rank_commands(commands)
    _add_local_commands(commands)
    cli_data.add_commands(commands)
    cli_run_folders.add_commands(commands)
    cli_checkpoint.add_command(commands)
    cli_submit.add_command(commands)
    cli_doctor.add_command(commands)
    return parser


class _Version(argparse.Action):
    """Print the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"dtrain {version('dtrain')}")
        parser.exit()


def _add_rank_commands(commands: Commands) -> None:
    """Add the commands that run on ranks."""
    train = commands.add_parser("train", help="train what a run file describes")
    _add_run_arguments(train)
    train.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="run folder (default: runs/<run file>); {seed}, {optimizer.lr} are keys of the run; "
        "for several runs of a sweep: the folder of all",
    )
    start = train.add_mutually_exclusive_group()
    start.add_argument(
        "--fresh",
        dest="resume",
        action="store_const",
        const="fresh",
        default="auto",
        help="start anew; what is in the folder is moved to DIR.old-1",
    )
    start.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="checkpoint to resume from (default: auto)",
    )
    _add_rank_arguments(train, _train_argv, _train)
    train.set_defaults(command=_train_on_ranks)

    script = commands.add_parser(
        "run",
        help="run your own script on ranks",
        usage="dtrain run [-h] [--ranks N] SCRIPT.py [-- ARG ...]",
    )
    script.add_argument("script", type=Path, metavar="SCRIPT.py")
    _add_rank_arguments(script, _script_argv, _run_script)

    evaluate = commands.add_parser("evaluate", help="test the newest checkpoint of a run")
    evaluate.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    _add_overrides(evaluate, "other data or prediction: data.test=FILE.h5, objective.chains=16")
    evaluate.add_argument(
        "--split",
        default="test",
        choices=("train", "test", "validation"),
        help="which samples (default: test)",
    )
    _add_weight_choices(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print plain values")
    _add_rank_arguments(evaluate, _evaluate_argv, _evaluate)
    _add_predict(commands)


def _add_predict(commands: Commands) -> None:
    predict = commands.add_parser("predict", help="write the outputs for samples to HDF5")
    predict.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    predict.add_argument(
        "data",
        metavar="DATA",
        help="file of HDF5, .npz, .npy, .csv or IDX; or train or test: a split of the run",
    )
    predict.add_argument("out", type=Path, metavar="OUT.h5")
    _add_overrides(predict, "other data or prediction: data.test=FILE.h5, objective.chains=16")
    _add_rank_arguments(predict, _predict_argv, _predict)


def _add_local_commands(commands: Commands) -> None:
    """Add the commands that run in this process, without MPI."""
    plan = commands.add_parser(
        "plan", help="show blocks, schedule, memory and messages without training"
    )
    _add_run_arguments(plan)
    plan.add_argument(
        "--ranks", type=_positive_int, required=True, metavar="N", help="ranks to plan for"
    )
    plan.add_argument("--json", action="store_true", help="print plain values")
    plan.add_argument(
        "--costs",
        type=Path,
        metavar="FILE.toml",
        help="speeds of ranks and links, to estimate the time",
    )
    plan.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the timeline")
    plan.set_defaults(command=_plan)

    flight = commands.add_parser("flight", help="diagnose a hanging run")
    flight.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    flight.set_defaults(command=_flight)

    export = commands.add_parser("export", help="write the trained weights as one state dict")
    export.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    export.add_argument("out", type=Path, metavar="OUT", help="file.pt or file.safetensors")
    export.add_argument(
        "--heads", action="store_true", help="also write the objective's own modules"
    )
    export.add_argument(
        "--factors", action="store_true", help="write low-rank weights as two factors"
    )
    export.add_argument(
        "--with-normalisation",
        action="store_true",
        help="also write mean and deviation of the inputs, as normalise.mean and normalise.std",
    )
    _add_weight_choices(export)
    export.set_defaults(command=_export)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a run to a command."""
    parser.add_argument("run", type=Path, metavar="RUN.toml")
    _add_overrides(parser, "override a key")


def _add_overrides(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add the option that overrides keys of a run."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_text)


def _add_weight_choices(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose among the weights of a run."""
    parser.add_argument("--best", action="store_true", help="those that [checkpoint] best kept")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of [ema]")


def _add_rank_arguments(
    parser: argparse.ArgumentParser, build_argv: ArgvBuilder, work: RankWork
) -> None:
    """Let a command run on ranks: `work` is that of each; `build_argv` returns the command line of
    a rank that `--ranks` starts."""
    parser.add_argument(
        "--ranks", type=_positive_int, metavar="N", help="start N ranks on this host"
    )
    parser.set_defaults(command=_run_on_ranks, build_argv=build_argv, work=work)


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _run_on_ranks(options: argparse.Namespace) -> int:
    """Run a command on the ranks that the launcher started; ``--ranks`` starts them first.

    ``-P`` keeps the current folder off the import path.
    """
    if options.ranks is None:
        return _run_rank(options)
    argv = [sys.executable, "-P", "-m", "dtrain", *options.build_argv(options)]
    return start_ranks(options.ranks, argv, os.environ)


def _train_on_ranks(options: argparse.Namespace) -> int:
    """Train a run, or all runs of a sweep, on the ranks of a launcher or on new ones."""
    if options.ranks is not None:
        from dtrain.config.sweep import read_sweep

        if runs := read_sweep(options.run, options.set, options.out):
            return cli_sweep.train_on_new_ranks(options, runs, _run_on_ranks)
    return _run_on_ranks(options)


def _train_argv(options: argparse.Namespace) -> list[str]:
    """Return the command line of a rank that trains."""
    argv = ["train", str(options.run), *_overrides_argv(options)]
    argv += ["--fresh"] if options.resume == "fresh" else ["--resume", options.resume]
    return argv if options.out is None else [*argv, "--out", str(options.out)]


def _evaluate_argv(options: argparse.Namespace) -> list[str]:
    """Return the command line of a rank that evaluates."""
    argv = ["evaluate", str(options.folder), "--split", options.split, *_overrides_argv(options)]
    flags = ("json", "best", "ema")
    return argv + [f"--{flag}" for flag in flags if getattr(options, flag)]


def _predict_argv(options: argparse.Namespace) -> list[str]:
    """Return the command line of a rank that predicts."""
    words = [str(options.folder), options.data, str(options.out)]
    return ["predict", *words, *_overrides_argv(options)]


def _script_argv(options: argparse.Namespace) -> list[str]:
    """Return the command line of a rank that runs a script."""
    return ["run", str(options.script), "--", *options.arguments]


def _overrides_argv(options: argparse.Namespace) -> list[str]:
    return [argument for override in options.set for argument in ("--set", override)]


def _run_rank(options: argparse.Namespace) -> int:
    """Do the work of one rank; end the job if this rank alone fails."""
    from dtrain.rank_process import report_error

    comm = dtrain.init()  # MPI comes before torch
    try:
        code: int | None = options.work(options, comm)
    except SystemExit:
        raise
    except BaseException as error:
        return report_error(error, comm)
    return code or 0


def _train(options: argparse.Namespace, comm: Comm) -> int | None:
    """Train, as one rank."""
    from dtrain.api import read_together
    from dtrain.comm.agree import all_or_none
    from dtrain.config.sweep import read_sweep

    if runs := all_or_none(comm, lambda: read_sweep(options.run, options.set, options.out)):
        return cli_sweep.train_in_turn(options, runs, comm)
    run = read_together(options.run, options.set, comm)
    _check_launcher(run.config.stages, comm.size, options.run)
    out = options.out or Path("runs") / options.run.stem
    dtrain.train(run, out, resume=options.resume, exact_mesh=True)
    return None


def _run_script(options: argparse.Namespace, comm: Comm) -> None:
    """Run a user's script, as one rank."""
    import runpy

    if not options.script.is_file():
        raise ConfigError(
            "run.no-script", f"there is no script {options.script}", on_all_ranks=True
        )
    sys.argv = [str(options.script), *options.arguments]
    sys.path.insert(0, str(options.script.resolve().parent))
    try:
        runpy.run_path(str(options.script), run_name="__main__")
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != str(options.script):
            trace = trace.tb_next
        raise error.with_traceback(trace) from error.__cause__


def _evaluate(options: argparse.Namespace, comm: Comm) -> None:
    """Evaluate, as one rank; rank 0 prints."""
    from dtrain.monitoring.summary import evaluation_text

    choice = {"best": options.best, "ema": options.ema}
    result = dtrain.evaluate(options.folder, options.split, set=options.set, **choice).record
    if comm.rank == 0:
        print(json.dumps(result, indent=2) if options.json else evaluation_text(result).rstrip())


def _predict(options: argparse.Namespace, comm: Comm) -> None:
    """Predict, as one rank; rank 0 writes."""
    dtrain.predict(options.folder, options.data, options.out, set=options.set)
    if comm.rank == 0:
        print(f"outputs   {options.out}")


def _check_launcher(stages: int | None, ranks: int, run_file: Path) -> None:
    """Refuse several stages where no launcher started ranks."""
    if ranks == 1 and (stages or 1) > 1 and detect_launcher(os.environ) is None:
        raise ConfigError(
            "mesh.no-launcher",
            f"{run_file} needs {stages} stages, and no launcher started ranks; on this host type\n"
            f"    dtrain train {run_file} --ranks {stages}\n"
            f"or in a Slurm job\n"
            f"    srun --mpi=pmix -n {stages} dtrain train {run_file}",
        )


def _plan(options: argparse.Namespace) -> int:
    """Print the plan of a run."""
    run = dtrain.Run.read(options.run, options.set)
    plan = dtrain.plan(run, options.ranks, costs=options.costs, exact_mesh=True)
    if options.plot is not None:
        _write_plot(options.plot, plan.svg())
    print(json.dumps(plan.table, indent=2) if options.json else str(plan).rstrip())
    return 0


def _write_plot(path: Path, svg: str) -> None:
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "plot.unwritable", f"cannot write {path}: {error.strerror}; choose another file"
        ) from error


def _flight(options: argparse.Namespace) -> int:
    """Print the diagnosis of a hanging run."""
    from dtrain.monitoring.hang_report import hang_report

    print("\n".join(hang_report(options.folder)))
    return 0


def _export(options: argparse.Namespace) -> int:
    """Write a state dict and print its size."""
    from dtrain.checkpoint.export import statistics_path

    normalises = options.with_normalisation
    state = dtrain.export(
        options.folder,
        options.out,
        heads=options.heads,
        factors=options.factors,
        with_normalisation=normalises,
        best=options.best,
        ema=options.ema,
    )
    count = sum(tensor.numel() for tensor in state.values())
    print(f"{options.out}: {len(state)} tensors, {count:,} numbers")
    statistics = statistics_path(options.out)
    if normalises:
        print("inputs    (x - normalise.mean) / normalise.std, as in training")
    elif statistics.exists():
        print(
            f"inputs    must be standardised as in training: mean and std are in {statistics}; "
            "--with-normalisation writes them into the file"
        )
    return 0
