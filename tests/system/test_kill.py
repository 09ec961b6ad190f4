"""Processes of runs are killed at random moments; the same command ends as the undisturbed run.

`make kill` does the same by the hundred.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kill.cases import CASES, Case
from tests.kill.harness import Part, undisturbed

KILLS = 5
"""Kills of each case, 30 in all."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.timeout(900)
def test_a_killed_run_loses_at_most_one_interval_and_ends_as_the_undisturbed_one(
    case: Case, tmp_path: Path
) -> None:
    """A rank, all ranks, mpirun or its parent is killed, half of the times inside a save."""
    reference = undisturbed(case, tmp_path / "reference")
    counts = Part(case, 0, tmp_path / "out", reference, orphan_limit_s=20.0).run(KILLS)
    assert counts.notes == []
    assert (counts.refused, counts.hangs, counts.orphans, counts.failures) == (0, 0, 0, 0)
    assert counts.max_lost <= case.max_lost
    assert (counts.ends, counts.identical_ends) == (1, 1)
    assert len(counts.kills) == KILLS
    assert counts.layout_changes > 0
