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

from dtrain.comm import launch_refusals
from dtrain.comm.flight_recorder import print_error
from dtrain.comm.launcher_detection import (
    Launch,
    detect_launcher,
    is_pty_shell,
    is_started_by_shell,
    pty_shell_cause,
    pty_shell_cure,
)
from dtrain.errors import ConfigError

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm

START_CPU_S = 1.5
"""CPU seconds in which a rank starts; more than a second of them belong to the import of torch."""


SLOW_START_S = 10.0
"""Seconds of a start that is announced, since a rank prints nothing before its imports."""


def world() -> Comm:
    """Return the group of all ranks of this run; without a launcher, of this process alone.

    Collective over all ranks under a launcher. Call it before torch is imported. Objects that
    exist afterwards are not searched for unused cycles.

    Raises
    ------
    ConfigError
        In a shell that `srun --pty` started for several tasks; and on the launcher's rank 0, if no
        MPI library can be loaded, if it found another number of ranks than were started, or if it
        allows no threads. The other ranks raise `SystemExit`, so only one message is printed.
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
    if (text := slow_start_text(launch, os.cpu_count() or 1)) and launch.rank == 0:
        print_error(text)
    try:
        from dtrain.comm.backends import mpi
    except (ImportError, RuntimeError) as error:
        refusal = launch_refusals.missing_library(os.environ, str(error))
        raise _on_rank_zero(launch, refusal) from error
    found = launch_refusals.wrong_world(
        os.environ, launch, mpi.world_size(), mpi.library_version()
    ) or launch_refusals.thread_level(mpi.thread_level())
    if found is not None:
        raise _on_rank_zero(launch, found)
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


def slow_start_text(launch: Launch, cores: int) -> str:
    """Return the line about ranks that share few cores and start slowly; empty: they do not.

    Parameters
    ----------
    cores : int
        Cores of this host.
    """
    start_s = (launch.local_size or 0) * START_CPU_S / cores
    if start_s < SLOW_START_S:
        return ""
    return (
        f"dtrain: {launch.local_size} ranks start on {cores} cores, which takes about "
        f"{start_s:.0f} s"
    )


def _on_rank_zero(launch: Launch, error: ConfigError) -> BaseException:
    """Return the error on the launcher's rank 0, a silent exit with its code elsewhere."""
    return SystemExit(error.code) if launch.rank else error
