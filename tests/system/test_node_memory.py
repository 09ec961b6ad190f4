"""Four ranks of a node hold a set of files once, as the kernel counts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.process import start

RANKS, MEGABYTES = 4, 128


def test_a_node_holds_a_set_once(mpirun: str, clean: dict[str, str], tmp_path: Path) -> None:
    """The sum of the proportional set sizes grows by the size of the set, not by four of them."""
    script = str(ROOT / "tests" / "system" / "node_memory_ranks.py")
    words = [sys.executable, script, str(tmp_path), str(MEGABYTES)]
    ended = start(
        [mpirun, "-n", str(RANKS), *words],
        limit_s=240,
        env=clean | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert (ended.late, ended.code, ended.left) == (False, 0, ()), ended.err
    table = json.loads((tmp_path / "memory.json").read_text())
    assert len(table["large"]) == RANKS
    growth = sum(table["large"]) - sum(table["tiny"])
    assert 0.9 < growth / table["set_bytes"] < 1.1, table
