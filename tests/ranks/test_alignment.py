"""What feedback through fixed matrices does to a net: the angles of `dfa` fall under 90 degrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.ranks.test_laws import trained

DIGITS: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [61, 47, 53]},
    "optimizer": {"name": "adam", "lr": 1e-3},
    "batch_size": 32,
    "micro_batches": 1,
    "dtype": "float32",
    "epochs": 6,
    "evaluate__every": 6,
}


@pytest.mark.parametrize("schedule", ["1f1b", "pipelined"])
def test_every_inner_block_aligns(schedule: str, tmp_path: Path) -> None:
    """From about 90 degrees, as random vectors have, on digits in three blocks on two ranks."""
    told = {"objective": {"name": "dfa", "angles": True}, "schedule__name": schedule}
    summary = trained(tiny.run(**DIGITS, **told, mesh__stages=2), tmp_path, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [each for each in map(json.loads, lines) if each["kind"] == "train"]
    first, last = (each["alignment_deg"] for each in (records[0], records[-1]))
    assert len(records) == 6
    assert last == summary["alignment_deg"]
    assert first[2] is last[2] is None
    for block in (0, 1):
        assert 65 < first[block] < 100
        assert last[block] < min(70, first[block] - 5)
    assert summary["test_accuracy"] > 0.8


def test_angles_are_recorded_only_where_they_are_asked_for(tmp_path: Path) -> None:
    told = {"objective__name": "dfa", "schedule__name": "1f1b", "mesh__stages": 3}
    without = trained(tiny.run(**told), tmp_path / "without", 3)
    told["objective__angles"] = True
    assert "alignment_deg" not in without
    digests = set()
    for stages in (1, 2, 3):
        run = tiny.run(**told | {"mesh__stages": stages})
        summary = trained(run, tmp_path / str(stages), stages)
        digests.add((summary["digest"], *summary["alignment_deg"]))
    ((digest, *_),) = digests
    assert digest == without["digest"], "it is looked at, not changed"


def test_angles_do_not_depend_on_micro_batches_or_replicas(tmp_path: Path) -> None:
    told = {"objective": {"name": "dfa", "angles": True}, "schedule__name": "1f1b"}
    found = [
        trained(tiny.run(**told, micro_batches=m, mesh__stages=2), tmp_path / f"{m}{n}", 2, n)
        for m, n in ((1, 1), (3, 1), (2, 2))
    ]
    for each in found[1:]:
        assert each["alignment_deg"][:2] == pytest.approx(found[0]["alignment_deg"][:2], rel=1e-9)
