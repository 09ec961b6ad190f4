"""`dtrain train` of a run file with a table `[sweep]`: its runs one after the other, then a table.

Invariant: all runs are checked and planned before the first one starts. A run that fails does not
end the sweep, as long as its ranks run.

::

    runs/net/                      the folder of the sweep
        optimizer.lr=0.1,seed=0/   a run folder for each run
        sweep.csv                  the table, written after each run
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dtrain
from dtrain.config.sweep import SweepRun
from dtrain.errors import SAVED_CODE, DtrainError

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm
    from dtrain.planning.plan import Plan

RankStarter = Callable[[argparse.Namespace], int]


def train_on_new_ranks(
    options: argparse.Namespace, runs: Sequence[SweepRun], start: RankStarter
) -> int:
    """Train each run of a sweep on ranks of its own; return the first code that is not 0.

    Runs that are finished are skipped. The sweep ends early with a run that is stopped.

    Parameters
    ----------
    start : callable
        Trains the run of the options that it gets, and returns the exit code.
    """
    folder, plans = _check_runs(options, runs, options.ranks)
    codes = []
    for number, run in enumerate(runs):
        out = folder / run.name
        if options.resume == "auto" and _is_finished(out, plans[number]):
            _print_head(number, runs, "finished before")
            continue
        _print_head(number, runs)
        words = vars(options) | {"set": [*options.set, *run.settings], "out": out}
        codes.append(start(argparse.Namespace(**words)))
        _write_table(folder)
        if codes[-1] == SAVED_CODE or codes[-1] >= 128:  # stopped by a signal
            return codes[-1]
    _print_table(folder)
    return next(filter(None, codes), 0)


def train_in_turn(options: argparse.Namespace, runs: Sequence[SweepRun], comm: Comm) -> int:
    """Train each run of a sweep on the ranks of `comm`; return the first code that is not 0.

    Collective over `comm`. Runs that failed before come last, since an error of a single rank ends
    all ranks, and with them the sweep.
    """
    from dtrain.comm.agree import all_or_none
    from dtrain.rank_process import report_error

    checked = all_or_none(
        comm, lambda: _check_runs(options, runs, comm.size)[0] if comm.rank == 0 else None
    )
    folder = Path(comm.allgather_object(str(checked))[0])
    order = comm.allgather_object(_failed_last(folder, runs) if comm.rank == 0 else [])[0]
    codes = []
    for number in order:
        if comm.rank == 0:
            _print_head(number, runs)
        run = dtrain.Run.read(options.run, [*options.set, *runs[number].settings])
        try:
            dtrain.train(run, folder / runs[number].name, resume=options.resume, exact_mesh=True)
        except DtrainError as error:
            if comm.size > 1 and not error.on_all_ranks:
                raise
            error.on_all_ranks = True
            codes.append(report_error(error, comm))
        if comm.rank == 0:
            _write_table(folder)
    if comm.rank == 0:
        _print_table(folder)
    return next(filter(None, codes), 0)


def _check_runs(
    options: argparse.Namespace, runs: Sequence[SweepRun], ranks: int
) -> tuple[Path, list[Plan]]:
    """Return the folder of a sweep and the plans of its runs.

    Raises
    ------
    DtrainError
        A run is not valid, or does not fit its data or the ranks; its name comes first.
    """
    from dtrain.comm.backends.single import SingleBackend
    from dtrain.comm.communicator import Comm
    from dtrain.config.out_folder import sweep_folder
    from dtrain.config.parse import read_run
    from dtrain.planning.plan import make_plan
    from dtrain.session.measured_cuts import settle_cuts

    alone, plans = Comm(SingleBackend()), []
    for run in runs:
        try:
            config = read_run(options.run, [*options.set, *run.settings])
            plans.append(make_plan(settle_cuts(config, alone, ranks), ranks))
        except DtrainError as error:
            raise error.with_prefix(run.name) from error
    out = options.out or Path("runs") / options.run.stem
    return sweep_folder(out, plans[0].run, runs), plans


def _is_finished(folder: Path, plan: Plan) -> bool:
    """Return whether a folder holds the finished run of a plan."""
    from dtrain.checkpoint.run_folder import read_summary

    try:
        text = (folder / "run.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return text == plan.run.to_text() and (read_summary(folder) or {}).get("status") == "finished"


def _failed_last(folder: Path, runs: Sequence[SweepRun]) -> list[int]:
    """Return the numbers of the runs, those that failed at the end."""
    from dtrain.checkpoint.run_folder import read_summary

    summaries = [read_summary(folder / run.name) or {} for run in runs]
    failed = [summary.get("status") == "failed" for summary in summaries]
    return sorted(range(len(runs)), key=lambda number: failed[number])


def _print_head(number: int, runs: Sequence[SweepRun], remark: str = "") -> None:
    text = f"run {number + 1} of {len(runs)}: {runs[number].name}"
    print(f"{text}: {remark}" if remark else text, flush=True)


def _write_table(folder: Path) -> None:
    """Write the table of the runs so far into the folder of a sweep."""
    from dtrain.run_report.run_table import CSV_NAME, write_run_table

    write_run_table([folder], folder / CSV_NAME)


def _print_table(folder: Path) -> None:
    from dtrain.run_report.run_table import CSV_NAME, read_run_table, table_text

    print(f"\n{table_text(read_run_table([folder]))}table  {folder / CSV_NAME}", flush=True)
