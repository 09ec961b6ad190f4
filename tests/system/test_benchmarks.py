"""Benchmarks print their record: the cheapest of them, on real ranks.

Invariant: nothing here judges a time; whoever else uses the machine must not decide a test.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KEYS = {"name", "label", "commit", "machine", "figures", "peer", "ratio", "spread"}


def test_quick_prints_one_record_as_its_last_line(clean: dict[str, str]) -> None:
    told = subprocess.run(
        [sys.executable, str(BENCHMARKS / "mean.py"), "--quick"],
        env=clean,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    record = json.loads(told.stdout.splitlines()[-1])
    assert record.keys() >= KEYS
    assert (record["name"], record["label"]) == ("mean", "measured")
    assert record["figures"].keys() == record["peer"].keys()
    assert min(*record["figures"].values(), *record["peer"].values(), record["ratio"]) > 0
    assert record["spread"] >= 0


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that scripts in the folder of benchmarks import."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("phases")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("local-sgd", {"steady": [1.0, 2.0, 3.0]}),
        ("qsr", {"short": [1.0, 2.0, 3.0], "long": [5.0, 6.0, 7.0]}),
    ],
)
def test_a_segment_that_ends_an_epoch_is_not_timed(
    phases: ModuleType, name: str, told: dict[str, list[float]]
) -> None:
    """Four segments in each epoch; the last has the epoch's evaluation and checkpoint."""
    length, ends = phases.rounds(name), range(1, 4 * len(told) + 1)
    records = [{"update": end * length, "train_s": float(end * length)} for end in ends]
    assert phases.steps(name, phases.Told({}, records)) == told


def test_what_a_change_costs_is_what_its_segment_takes_beside_steps(phases: ModuleType) -> None:
    """Segments of 8 updates: steps of 1 s in full rank and 0.5 s in low, and a change in each."""
    seconds = [8.0, 8.0, 8.0, 8.0 + 3.0, 4.0, 4.0, 4.0, 4.0 + 1.5]
    records = [{"update": 8 * n, "train_s": each} for n, each in enumerate(seconds, 1)]
    told = phases.Told({}, records)
    assert phases.steps("ab", told) == {"full": [1.0] * 3, "low": [0.5] * 3}
    assert phases.changes("ab", told) == {"split": 3.0, "merge": 1.5}
    assert phases.changes("oialr", told) == {"split": 3.0, "round": 1.5}
    assert phases.changes("daso", phases.Told({}, records)) == {}


@pytest.mark.parametrize("name", ["ab", "oialr"])
def test_the_whole_run_of_low_rank_adds_up(phases: ModuleType, name: str) -> None:
    """All updates are of one phase; a run of `ab` ends on a merge."""
    found = phases.counts(name, 8, 8, 391)
    assert found["full"] + found["low"] == 8 * 391
    if name == "ab":
        assert found["split"] == found["merge"]


SENT = {"bytes_inter_node": 100.0, "interface_bytes": 103.0, "changes_s": {}}
WHOLE = {"curve": [0.3, 0.495, 0.49, 0.5], "updates": 40}
STEPS = {
    # by phase; the first segment of all warms up
    "every-step": {"steady": [9.0, 2.0, 2.0]},
    "daso": {"warm-up": [9.0, 2.0, 2.0], "cycling": [0.5, 0.5, 9.0], "cool-down": [2.0] * 3},
    "qsr": {"short": [1.0 + 2.4 / 4] * 3, "long": [1.0 + 2.4 / 24] * 3},
}


def test_times_to_accuracy_follow_from_phases_and_curves(phases: ModuleType) -> None:
    """Four epochs of ten updates; the target is one point below what `every-step` ends on."""
    learnt = {
        "every-step": {**WHOLE, "bytes_inter_node_per_update": 80.0},
        "daso": {**WHOLE, "curve": [0.3, 0.4, 0.491, 0.4], "bytes_inter_node_per_update": 50.0},
        "qsr": {**WHOLE, "curve": [0.3, 0.4, 0.4, 0.5], "bytes_inter_node_per_update": 10.0},
    }
    rows = {name: [{"step_s": each, **SENT}] * 2 for name, each in STEPS.items()}
    link = {**rows, "ddp": [{"step_s": 4.0}, {"step_s": 5.0}]}
    steps = phases.timings({"1gbit": link}) | {"commit": "abc"}
    assert steps["figures"]["1gbit daso cycling step_s"] == 0.5
    assert steps["peer"].keys() == steps["figures"].keys()
    assert set(steps["peer"].values()) == {4.5}
    assert steps["links"]["1gbit"]["daso"]["interface_over_counted"] == 1.03
    told = phases.joined(learnt, steps)
    assert told["target"] == pytest.approx(0.49)
    seconds = {n: row["links"]["1gbit"]["to_accuracy_s"] for n, row in told["strategies"].items()}
    # Two epochs; one at 2 s and two at 0.5 s; all four with one mean of 2.4 s per 8 updates.
    assert seconds == pytest.approx({"every-step": 40.0, "daso": 30.0, "qsr": 40.0 + 5 * 2.4})
    assert told["peer"]["1gbit daso to_accuracy_s"] == 2 * 10 * 4.5
    assert told["peer"].keys() == told["figures"].keys()
    assert told["steps"] == "abc"


def test_the_row_of_several_seeds_is_their_mean_epoch_by_epoch(phases: ModuleType) -> None:
    rows = [{"curve": [0.25, 0.5], "updates": 9}, {"curve": [0.75, 1.0], "updates": 9}]
    curves = [row["curve"] for row in rows]
    assert phases.together(rows) == {"curve": [0.5, 0.75], "updates": 9, "curves": curves}
    with pytest.raises(ValueError, match="shorter"):
        phases.together([*rows, {"curve": [0.5], "updates": 9}])


def test_a_strategy_that_never_gets_there_has_no_time(phases: ModuleType) -> None:
    learnt = {
        name: {**WHOLE, "bytes_inter_node_per_update": 8.0} for name in ("every-step", "daso")
    }
    learnt["daso"]["curve"] = [0.1] * 4
    rows = {name: [{"step_s": STEPS[name], **SENT}] for name in learnt}
    steps = phases.timings({"1gbit": {**rows, "ddp": [{"step_s": 4.0}]}})
    told = phases.joined(learnt, steps | {"commit": ""})
    assert told["strategies"]["daso"]["links"]["1gbit"] == {
        "run_s": 10 * (2.0 + 0.5 + 0.5 + 2.0),
        "to_accuracy_s": None,
    }
    assert "1gbit daso to_accuracy_s" not in told["figures"]
