"""The tests of tests/mpi under one mpirun.

The limit stands outside: a hang may come in finalise, after all tests passed.
"""

from __future__ import annotations

import sys

from tests.conftest import ROOT
from tests.process import start

RANKS = 4


def test_suite_passes_under_mpirun(mpirun: str, clean: dict[str, str]) -> None:
    """Groups of 1 to 4 ranks run the contract, see `tests/mpi/conftest.py`."""
    pytest_ = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
    suite = [mpirun, "-n", str(RANKS), *pytest_, "--with-mpi", "tests/mpi"]
    ended = start(suite, limit_s=240, env=clean, cwd=ROOT)
    text = f"{ended.out}\n{ended.err}"
    assert not ended.late, text
    assert ended.code == 0, text
    assert not ended.left, text
    assert ended.out.count(" passed") == RANKS, text
