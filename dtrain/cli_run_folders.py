"""The commands that read run folders: `dtrain status`, `compare` and `report`.

Invariant: they import neither torch nor MPI, and only `report` writes files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


DEFAULT_PAGE = Path("report.html")


def add_commands(commands: Commands) -> None:
    """Add the commands to those of `dtrain`."""
    status = commands.add_parser("status", help="show how far a run is and when it will end")
    status.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    status.add_argument("--json", action="store_true", help="print plain values")
    status.set_defaults(command=_status)

    compare = commands.add_parser("compare", help="compare two runs key by key")
    compare.add_argument("first", type=Path, metavar="DIR", help="run folder")
    compare.add_argument("second", type=Path, metavar="DIR", help="another run folder")
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
    """Print the state of a run."""
    from dtrain.run_report.status import run_status, status_text

    if options.json:
        print(json.dumps(run_status(options.folder), indent=2))
    else:
        print(status_text(options.folder), end="")
    return 0


def _compare(options: argparse.Namespace) -> int:
    """Print the differences of two runs."""
    from dtrain.run_report.compare import compare_runs, comparison_text

    if options.json:
        print(json.dumps(compare_runs(options.first, options.second), indent=2))
    else:
        print(comparison_text(options.first, options.second), end="")
    return 0


def _report(options: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from dtrain.errors import ConfigError
    from dtrain.run_report.page import report

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
    print(f"page    {report(folders, page, options.png).resolve()}")
    if options.png is not None:
        print(f"charts  {options.png.resolve()}")
    return 0
