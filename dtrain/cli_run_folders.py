"""The commands that read run folders: `dtrain status`, `compare` and `report`.

Invariant: they import neither torch nor MPI, and only `report` and `compare --csv` write files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from dtrain.run_report.run_table import RunTable

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


DEFAULT_PAGE = Path("report.html")


def add_commands(commands: Commands) -> None:
    """Add the commands to those of `dtrain`."""
    status = commands.add_parser("status", help="show how far a run is and when it will end")
    status.add_argument("folder", type=Path, metavar="DIR", help="run folder, or that of a sweep")
    status.add_argument("--json", action="store_true", help="print plain values")
    status.set_defaults(command=_status)

    compare = commands.add_parser(
        "compare",
        help="compare two runs key by key, or several in one table",
        description="Two run folders are compared key by key. Several, or a folder that holds run "
        "folders (of a sweep), are one table, the best run first.",
    )
    compare.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="run folders")
    compare.add_argument("--sort", metavar="NAME", help="sort the table by this value: test_loss")
    compare.add_argument("--csv", type=Path, metavar="FILE.csv", help="also write the table")
    compare.add_argument("--json", action="store_true", help="print plain values")
    compare.set_defaults(command=_compare)

    report = commands.add_parser("report", help="write one HTML page about one or several runs")
    report.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="DIR",
        help=f"run folders; a last argument OUT.html names the page (default: {DEFAULT_PAGE})",
    )
    report.add_argument("--png", type=Path, metavar="DIR", help="also write the charts as PNG")
    report.set_defaults(command=_report)


def _status(options: argparse.Namespace) -> int:
    """Print the state of a run, or the table of the runs in a folder."""
    from dtrain.run_report.run_table import holds_runs, read_run_table
    from dtrain.run_report.status import run_status, status_text

    if holds_runs(options.folder):
        _print_table(read_run_table([options.folder]), options.json)
    elif options.json:
        print(json.dumps(run_status(options.folder), indent=2))
    else:
        print(status_text(options.folder), end="")
    return 0


def _compare(options: argparse.Namespace) -> int:
    """Print the differences of two runs, or the table of several ones."""
    from dtrain.run_report.compare import compare_runs, comparison_text
    from dtrain.run_report.run_table import expand_folders, read_run_table, write_run_table

    is_table = options.sort is not None or options.csv is not None
    if (
        len(options.folders) == 2
        and not is_table
        and expand_folders(options.folders) == (options.folders)
    ):
        if options.json:
            print(json.dumps(compare_runs(*options.folders), indent=2))
        else:
            print(comparison_text(*options.folders), end="")
        return 0
    if options.csv is None:
        table = read_run_table(options.folders, options.sort)
    else:
        table = write_run_table(options.folders, options.csv, options.sort)
    _print_table(table, options.json)
    return 0


def _print_table(table: RunTable, as_json: bool) -> None:
    from dtrain.run_report.run_table import table_text

    print(json.dumps(table.to_json(), indent=2) if as_json else table_text(table).rstrip())


def _report(options: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from dtrain.errors import ConfigError
    from dtrain.run_report.page import report
    from dtrain.run_report.run_table import expand_folders

    *folders, last = options.paths
    page = DEFAULT_PAGE
    if last.suffix.lower() in (".html", ".htm") and not last.is_dir():
        page = last
    else:
        folders.append(last)
    if not folders:
        raise ConfigError(
            "report.no-folder",
            f"no run folder is given for {page}: type `dtrain report runs/demo {page}`",
        )
    print(f"page    {report(expand_folders(folders), page, options.png).resolve()}")
    if options.png is not None:
        print(f"charts  {options.png.resolve()}")
    return 0
