"""Arithmetic of the `slow_link` benchmarks: step times, costs of changes, times to accuracy.

Invariant: no test starts ranks or measures a time; all inputs are made-up records.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which the scripts beside it import by its bare name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("phases")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("local-sgd", {"steady": [1.0, 2.0, 3.0]}),
        ("qsr", {"short": [1.0, 2.0, 3.0], "long": [5.0, 6.0, 7.0]}),
    ],
)
def test_a_segment_that_ends_an_epoch_is_not_timed(
    phases: ModuleType, name: str, expected: dict[str, list[float]]
) -> None:
    """Four segments per epoch; the last contains the epoch's evaluation and checkpoint."""
    updates, ends = phases.segment_updates(name), range(1, 4 * len(expected) + 1)
    records = [{"update": end * updates, "train_s": float(end * updates)} for end in ends]
    assert phases.step_seconds(name, phases.RunResult({}, records)) == expected


def test_the_cost_of_a_change_is_the_time_of_its_segment_without_the_steps(
    phases: ModuleType,
) -> None:
    """Segments of 8 updates: steps of 1 s in full rank and 0.5 s in low, and a change in each."""
    seconds = [8.0, 8.0, 8.0, 8.0 + 3.0, 4.0, 4.0, 4.0, 4.0 + 1.5]
    records = [{"update": 8 * n, "train_s": train_s} for n, train_s in enumerate(seconds, 1)]
    result = phases.RunResult({}, records)
    assert phases.step_seconds("ab", result) == {"full": [1.0] * 3, "low": [0.5] * 3}
    assert phases.change_seconds("ab", result) == {"split": 3.0, "merge": 1.5}
    assert phases.change_seconds("oialr", result) == {"split": 3.0, "round": 1.5}
    assert phases.change_seconds("daso", result) == {}


@pytest.mark.parametrize("name", ["ab", "oialr"])
def test_the_whole_run_of_low_rank_adds_up(phases: ModuleType, name: str) -> None:
    """Every update belongs to one phase; a run of `ab` ends on a merge."""
    counts = phases.count_updates(name, 8, 8, 391)
    assert counts["full"] + counts["low"] == 8 * 391
    if name == "ab":
        assert counts["split"] == counts["merge"]


SENT = {"bytes_inter_node": 100.0, "interface_bytes": 103.0, "changes_s": {}}
ACCURACY = {"curve": [0.3, 0.495, 0.49, 0.5], "updates": 40}
STEPS = {
    # By phase.
    "every-step": {"steady": [9.0, 2.0, 2.0]},
    "daso": {"warm-up": [9.0, 2.0, 2.0], "cycling": [0.5, 0.5, 9.0], "cool-down": [2.0] * 3},
    "qsr": {"short": [1.0 + 2.4 / 4] * 3, "long": [1.0 + 2.4 / 24] * 3},
}


def test_times_to_accuracy_follow_from_phases_and_curves(phases: ModuleType) -> None:
    """Four epochs of ten updates; the target is one point below the end of `every-step`."""
    accuracies = {
        "every-step": {**ACCURACY, "bytes_inter_node_per_update": 80.0},
        "daso": {
            **ACCURACY,
            "curve": [0.3, 0.4, 0.491, 0.4],
            "bytes_inter_node_per_update": 50.0,
        },
        "qsr": {**ACCURACY, "curve": [0.3, 0.4, 0.4, 0.5], "bytes_inter_node_per_update": 10.0},
    }
    rows = {name: [{"step_s": step_s, **SENT}] * 2 for name, step_s in STEPS.items()}
    link = {**rows, "ddp": [{"step_s": 4.0}, {"step_s": 5.0}]}
    timings = phases.timing_tables({"1gbit": link}) | {"commit": "abc"}
    assert timings["figures"]["1gbit daso cycling step_s"] == 0.5
    assert timings["peer"].keys() == timings["figures"].keys()
    assert set(timings["peer"].values()) == {4.5}
    assert timings["links"]["1gbit"]["daso"]["interface_over_counted"] == 1.03
    tables = phases.accuracy_tables(accuracies, timings)
    assert tables["target"] == pytest.approx(0.49)
    seconds = {
        name: row["links"]["1gbit"]["to_accuracy_s"] for name, row in tables["strategies"].items()
    }
    # Two epochs; one at 2 s and two at 0.5 s; all four with one mean of 2.4 s per 8 updates.
    assert seconds == pytest.approx({"every-step": 40.0, "daso": 30.0, "qsr": 40.0 + 5 * 2.4})
    assert tables["peer"]["1gbit daso to_accuracy_s"] == 2 * 10 * 4.5
    assert tables["peer"].keys() == tables["figures"].keys()
    assert tables["steps"] == "abc"


def test_the_row_of_several_seeds_is_their_mean_epoch_by_epoch(phases: ModuleType) -> None:
    rows = [{"curve": [0.25, 0.5], "updates": 9}, {"curve": [0.75, 1.0], "updates": 9}]
    curves = [row["curve"] for row in rows]
    assert phases.average_seeds(rows) == {"curve": [0.5, 0.75], "updates": 9, "curves": curves}
    with pytest.raises(ValueError, match="shorter"):
        phases.average_seeds([*rows, {"curve": [0.5], "updates": 9}])


def test_a_strategy_that_misses_the_target_has_no_time_to_accuracy(phases: ModuleType) -> None:
    accuracies = {
        name: {**ACCURACY, "bytes_inter_node_per_update": 8.0} for name in ("every-step", "daso")
    }
    accuracies["daso"]["curve"] = [0.1] * 4
    rows = {name: [{"step_s": STEPS[name], **SENT}] for name in accuracies}
    timings = phases.timing_tables({"1gbit": {**rows, "ddp": [{"step_s": 4.0}]}})
    tables = phases.accuracy_tables(accuracies, timings | {"commit": ""})
    assert tables["strategies"]["daso"]["links"]["1gbit"] == {
        "run_s": 10 * (2.0 + 0.5 + 0.5 + 2.0),
        "to_accuracy_s": None,
    }
    assert "1gbit daso to_accuracy_s" not in tables["figures"]
