"""Tests under mpirun: a rank that fails or hangs is seen, and takes the others down.

Invariant: no test waits for a rank that has failed: that one says so and, after a grace in which
the others may say why they failed, too, ends the job.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Generator, Iterator

import pytest

from dtrain.comm.backends import mpi  # before torch
from dtrain.comm.communicator import Comm

GRACE_S = 2.0
LIMIT_S = 90.0

WORLD = mpi.world_backend()
SCREEN = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real stderr: pytest captures it while tests run."""
    config.stash[SCREEN] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End the job where one of several ranks fails."""
    report = yield
    if report.failed and WORLD.size > 1:
        words = f"\nrank {WORLD.rank} of {WORLD.size}: {item.nodeid}\n{report.longreprtext}\n"
        os.write(item.config.stash[SCREEN], words.encode())
        time.sleep(GRACE_S)
        WORLD.abort(1)
    return report


@pytest.fixture(autouse=True)
def limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Dump all stacks and leave where a test takes too long."""
    screen = request.config.stash[SCREEN]
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=screen)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def comm(limit: None) -> Comm:
    """A world of this test's own."""
    return Comm(WORLD.split(0, 0), timeout_s=60.0)
