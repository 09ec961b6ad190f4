"""The tests of tests/mpi under 1 to 4 ranks, each time in processes of their own.

The limit stands outside: a hang may come in finalise, after all tests passed.
"""

from __future__ import annotations

import sys

import pytest

from tests.conftest import ROOT
from tests.process import start


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_suite_passes_under_mpirun(ranks: int, mpirun: str, clean: dict[str, str]) -> None:
    pytest_ = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
    suite = [mpirun, "-n", str(ranks), *pytest_, "--with-mpi", "tests/mpi"]
    ended = start(suite, limit_s=240, env=clean, cwd=ROOT)
    told = f"{ended.out}\n{ended.err}"
    assert not ended.late, told
    assert ended.code == 0, told
    assert not ended.left, told
    assert ended.out.count(" passed") == ranks, told
