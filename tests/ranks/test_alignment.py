"""Feedback alignment: the angles of `dfa` to the gradient fall under 90 degrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.run import RunConfig
from tests import tiny
from tests.harness import train_in_threads

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
    """Angles start at about 90 degrees, as of random vectors; digits, three blocks, two ranks."""
    run = tiny.run(
        **DIGITS,
        objective={"name": "dfa", "angles": True},
        schedule__name=schedule,
        mesh__stages=2,
    )
    summary = train_in_threads(run, tmp_path, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    first, last = records[0]["alignment_deg"], records[-1]["alignment_deg"]
    assert len(records) == 6
    assert last == summary["alignment_deg"]
    assert first[2] is last[2] is None
    for block in (0, 1):
        assert 65 < first[block] < 100
        assert last[block] < min(70, first[block] - 5)
    assert summary["test_accuracy"] > 0.8


def dfa_run(angles: bool, **changes: Any) -> RunConfig:
    """Return a run of `dfa` that flushes the pipeline."""
    objective = {"name": "dfa", "angles": angles}
    return tiny.run(objective=objective, schedule__name="1f1b", **changes)


def test_angles_are_recorded_only_if_the_run_file_says_so(tmp_path: Path) -> None:
    """Recording them changes nothing that is trained, and no layout changes them."""
    without = train_in_threads(dfa_run(False, mesh__stages=3), tmp_path / "without", 3)
    assert "alignment_deg" not in without
    outcomes = set()
    for stages in (1, 2, 3):
        summary = train_in_threads(
            dfa_run(True, mesh__stages=stages), tmp_path / str(stages), stages
        )
        outcomes.add((summary["digest"], *summary["alignment_deg"]))
    ((digest, *_),) = outcomes
    assert digest == without["digest"]


def test_angles_do_not_depend_on_micro_batches_or_replicas(tmp_path: Path) -> None:
    angles = []
    for micros, replicas in ((1, 1), (3, 1), (2, 2)):
        run = dfa_run(True, micro_batches=micros, mesh__stages=2)
        summary = train_in_threads(run, tmp_path / f"{micros}{replicas}", 2, replicas)
        angles.append(summary["alignment_deg"][:2])
    for other in angles[1:]:
        assert other == pytest.approx(angles[0], rel=1e-9)
