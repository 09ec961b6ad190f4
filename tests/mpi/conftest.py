"""Tests under mpirun: a rank that fails or hangs prints why and ends the others.

Invariant: no test waits for a rank that has failed. A rank that fails prints its report and, after
a delay in which other failing ranks can print theirs, ends the job.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Generator, Iterator

import pytest

from dtrain.comm.backends import mpi  # before torch
from dtrain.comm.communicator import Comm
from tests.ranks.contract import ObservedBackend

ABORT_DELAY_S = 2.0
LIMIT_S = 90.0

WORLD = mpi.world_backend()
STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real stderr: pytest captures it while tests run."""
    config.stash[STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End the job if one of several ranks fails."""
    report = yield
    if report.failed and WORLD.size > 1:
        text = f"\nrank {WORLD.rank} of {WORLD.size}: {item.nodeid}\n{report.longreprtext}\n"
        os.write(item.config.stash[STDERR], text.encode())
        time.sleep(ABORT_DELAY_S)
        WORLD.abort(1)
    return report


@pytest.fixture(autouse=True)
def limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Dump all stacks and exit if a test takes too long."""
    stderr = request.config.stash[STDERR]
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def comm(limit: None) -> Comm:
    """Return a new group of all ranks."""
    return Comm(ObservedBackend(WORLD.split(0, 0)), timeout_s=60.0)


@pytest.fixture(params=range(WORLD.size, (WORLD.size + 1) // 2 - 1, -1))
def group(request: pytest.FixtureRequest, limit: None) -> Comm:
    """Return this rank's group: the first `param` ranks are one group, all others another.

    Four ranks are in turn groups of 4, of 3 and 1, and of 2 and 2, so a test runs on groups of
    every size. Each group is numbered as a world.
    """
    backend = WORLD.split(int(WORLD.rank >= request.param), 0)
    backend.world_ranks = tuple(range(backend.size))
    return Comm(ObservedBackend(backend), timeout_s=60.0)
