"""Start the MPI library in a process of its own, under a time limit.

Invariant: this process never loads MPI. A library that hangs, aborts or is missing is a result.
As a program (`python -m dtrain.doctor.probe`) it starts MPI and prints the facts as one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from dtrain.doctor.library import (
    UNKNOWN,
    binary_interface,
    gpu_awareness,
    library_files,
    load,
)
from dtrain.doctor.programs import run_captured

LIMIT_S = 20.0
"""Seconds that a library may take to start; a healthy one takes less than one."""


MARK = "dtrain-mpi-facts "
"""Start of the line that the program prints."""


PROBE_COMMAND = (sys.executable, "-P", "-m", "dtrain.doctor.probe")


@final
@dataclass(frozen=True)
class MpiFacts:
    """The MPI library, or how it failed to start.

    Attributes
    ----------
    outcome : str
        "started"; "missing" (mpi4py loads no library), "failed" (the process ended) or "hangs".
    text : str
        The reason, or the last lines that the process printed.
    abi : str
        Binary interface of the library; empty: unknown.
    files : sequence of str
        Files of the MPI libraries that are loaded.
    gpu_aware : str
        GPUs whose memory the library sends, "none" or "unknown".
    """

    outcome: Literal["started", "missing", "failed", "hangs"]
    library: str = ""
    mpi4py: str = ""
    thread_level: str = ""
    world_size: int = 0
    text: str = ""
    abi: str = ""
    files: Sequence[str] = ()
    gpu_aware: str = UNKNOWN


def probe_mpi(
    environ: Mapping[str, str],
    limit_s: float = LIMIT_S,
    command: Sequence[str] = PROBE_COMMAND,
) -> MpiFacts:
    """Start MPI in a subprocess with this environment and return the facts."""
    try:
        done = run_captured(command, environ, limit_s)
    except subprocess.TimeoutExpired:
        return MpiFacts("hangs", text=f"{limit_s:g} s")
    except OSError as error:
        return MpiFacts("failed", text=str(error))
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return MpiFacts(**json.loads(line.removeprefix(MARK)))
    return MpiFacts("failed", text=_last_lines(done.stdout + done.stderr, done.returncode))


def _last_lines(output: str, code: int) -> str:
    """Return the end of a failed program's output, or its exit code where it printed nothing."""
    lines = [line.strip(" -") for line in output.splitlines() if line.strip(" -*")]
    return " / ".join(lines[-6:])[-600:] or f"exit code {code}, no message"


def mpi_facts() -> MpiFacts:
    """Start MPI in this process, if it has not started, and return the facts."""
    from importlib.metadata import version

    try:
        from dtrain.comm.backends import mpi
    except (ImportError, RuntimeError) as error:
        return MpiFacts("missing", text=str(error).splitlines()[0])
    files = library_files()
    library = load(files)
    return MpiFacts(
        outcome="started",
        library=mpi.library_version(),
        mpi4py=version("mpi4py"),
        thread_level=mpi.thread_level(),
        world_size=mpi.world_size(),
        abi=binary_interface(library),
        files=files,
        gpu_aware=gpu_awareness(library, os.environ),
    )


def main() -> None:
    """Print the facts of this process."""
    print(MARK + json.dumps(vars(mpi_facts())), flush=True)


if __name__ == "__main__":
    main()
