"""The command `dtrain checkpoint`: list, verify and compare the checkpoints of runs.

Invariant: nothing is written, and MPI is not imported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(commands: Commands) -> None:
    """Add the command to those of `dtrain`."""
    checkpoint = commands.add_parser("checkpoint", help="list, verify and compare checkpoints")
    verbs = checkpoint.add_subparsers(required=True, metavar="VERB")
    for verb, text in (
        ("ls", "list the checkpoints of a run"),
        ("verify", "read every file of every checkpoint and compare its hash; 5: one is damaged"),
    ):
        parser = verbs.add_parser(verb, help=text)
        parser.add_argument("folder", type=Path, metavar="DIR", help="run folder")
        parser.add_argument("--json", action="store_true", help="print plain values")
        parser.set_defaults(command=_list, verify=verb == "verify")
    diff = verbs.add_parser("diff", help="compare two checkpoints, tensor by tensor")
    place = "run folder (its newest checkpoint), or one checkpoints/update-N"
    diff.add_argument("first", type=Path, metavar="DIR", help=place)
    diff.add_argument("second", type=Path, metavar="DIR", help="another one")
    diff.add_argument("--json", action="store_true", help="print plain values")
    diff.set_defaults(command=_diff)


def _list(options: argparse.Namespace) -> int:
    """Print the checkpoints; return 5 where one of them is damaged."""
    from dtrain.checkpoint.inspection import list_checkpoints, rows_as_json, rows_text
    from dtrain.errors import CheckpointError

    rows = list_checkpoints(options.folder, options.verify)
    text = json.dumps(rows_as_json(rows), indent=2) + "\n" if options.json else rows_text(rows)
    print(text, end="")
    if options.verify and not options.json and not any(row.is_damaged for row in rows):
        print("all files are whole")
    return CheckpointError.code if any(row.is_damaged for row in rows) else 0


def _diff(options: argparse.Namespace) -> int:
    """Print the differences; return 1 where there are any, as `diff` does."""
    from dtrain.checkpoint.inspection import compare_checkpoints, comparison_text

    comparison = compare_checkpoints(options.first, options.second)
    text = json.dumps(comparison, indent=2) + "\n" if options.json else comparison_text(comparison)
    print(text, end="")
    return 0 if comparison["equal"] else 1
