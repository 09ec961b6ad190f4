"""Tools for all tests.

`data_dir`
    Fixture: the folder with the data files (`DTRAIN_DATA`, else `../shared/data` beside the
    repository). A test that misses a file in it calls `lack("data", reason)`.
`tests.need.lack(what, reason)`
    Skips, or fails if `DTRAIN_REQUIRE` names `what`. Names in use: cluster, data, mpich.
`tests.process.start(argv, limit_s, env, cwd)`
    Runs a program with a limit, returns how it `Ended` (code, out, err, wall_s, late, left) and
    kills the processes that it left behind, including ranks.
`tests.cluster`
    Slurm hosts on this machine; tests take the fixture `cluster` of `tests/system/conftest.py`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.need import lack

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude torch and the tests from garbage collection, and collect less often."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000)
        gc.enable()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder that holds the data files of tests and benchmarks."""
    folder = Path(os.environ.get("DTRAIN_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        lack("data", f"no data folder {folder}: set DTRAIN_DATA")
    return folder
