"""Unusual schedules, run by the engine: the laws that they must keep."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from dtrain.schedules import SCHEDULES
from tests import tiny
from tests.harness import FULL, pairwise, train_in_threads
from tests.witness.split import Split

WITNESSES = {"split": Split}
NETS = {
    "mlp": {"name": "mlp", "widths": [13, 11, 7, 6]},
    "dropping": {"name": "tests.tiny:dropping"},
    "normalised": {"name": "tests.tiny:normalised"},
    "writing": {"name": "tests.tiny:writing"},
}


@pytest.fixture(autouse=True)
def register_witnesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the witnesses names in run files."""
    for name, kind in WITNESSES.items():
        monkeypatch.setitem(SCHEDULES, name, kind)


def train_tiny(out: Path, stages: int = 1, replicas: int = 1, **changes: Any) -> dict[str, Any]:
    """Train the tiny run in four blocks by backpropagation on `stages` x `replicas` threads."""
    defaults = {"partition__blocks": 4, "mesh__stages": stages, "objective__name": "backprop"}
    return train_in_threads(tiny.run(**{**defaults, **changes}), out, stages, replicas)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("schedule", WITNESSES)
def test_every_synchronous_order_trains_the_same_bits(
    schedule: str, net: str, tmp_path: Path
) -> None:
    """A split backward; loops and a V: tests/ranks/test_places.py."""
    changes = {"model": NETS[net], "epochs": 1}
    expected = train_tiny(tmp_path / "1f1b", 2, schedule__name="1f1b", **changes)
    for stages in (1, 2, 4) if FULL or net == "mlp" else (4,):
        summary = train_tiny(tmp_path / str(stages), stages, schedule__name=schedule, **changes)
        assert summary["digest"] == expected["digest"]


@pytest.mark.parametrize(
    ("objective", "schedule", "net"),
    pairwise(list(itertools.product(tiny.NEIGHBOURS, ["1f1b", "split"], NETS))),
)
def test_recomputation_changes_no_bit(
    objective: str, schedule: str, net: str, tmp_path: Path
) -> None:
    """Activation recomputation repeats batch statistics and dropout exactly."""
    changes = {"model": NETS[net], "objective__name": objective, "schedule__name": schedule}
    digests = set()
    for recompute in (False, True, [1]):
        out = tmp_path / str(recompute)
        summary = train_tiny(out, 2, **changes, partition__recompute=recompute, epochs=1)
        digests.add(summary["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("net", ["mlp", "writing", "dropping"])
def test_pipelined_is_the_same_on_any_number_of_ranks(net: str, tmp_path: Path) -> None:
    """Delays count blocks, not ranks: one rank with four blocks trains as four ranks do."""
    changes = {"schedule__name": "pipelined", "micro_batches": 1, "batch_size": 5}
    summaries = [train_tiny(tmp_path / str(n), n, model=NETS[net], **changes) for n in (1, 2, 4)]
    assert len({summary["digest"] for summary in summaries}) == 1
    assert summaries[2]["staleness"] == [6, 4, 2, 0]
