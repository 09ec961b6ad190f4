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
        done = subprocess.run(
            [path, *argv[1:]],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None
