"""Run the command line: `python -m dtrain` is the same program as `dtrain`."""

from __future__ import annotations

import sys

from dtrain.comm.early_signals import ignore_warnings, remember_warnings
from dtrain.comm.rank_marks import mark_ready


def main() -> int:
    """Run one command; a warning of the scheduler is remembered from now on, and ends nothing."""
    remember_warnings()
    mark_ready()
    from dtrain.cli import main as run_command

    try:
        return run_command()
    finally:
        ignore_warnings()


if __name__ == "__main__":
    sys.exit(main())
