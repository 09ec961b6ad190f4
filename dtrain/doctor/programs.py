"""Outputs of programs on PATH, under a time limit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence

LIMIT_S = 10.0


def program_output(
    argv: Sequence[str], environ: Mapping[str, str], limit_s: float = LIMIT_S
) -> str | None:
    """Return what a program prints; None: it is missing, fails, or exceeds the limit."""
    path = shutil.which(argv[0], path=environ.get("PATH"))
    if path is None:
        return None
    try:
        done = run_captured([path, *argv[1:]], environ, limit_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def run_captured(
    argv: Sequence[str], environ: Mapping[str, str], limit_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a program without input, in a session of its own, and return what it printed.

    Raises
    ------
    OSError, subprocess.TimeoutExpired
        It cannot start, or exceeds the limit.
    """
    return subprocess.run(
        argv,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
        check=False,
        start_new_session=True,
    )
