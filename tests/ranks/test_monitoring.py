"""What a run prints and records of itself: figures, trackers, notes, and the head of its log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.errors import DataError
from dtrain.monitoring import start_log
from dtrain.monitoring.figures import positions_per_sample, rank_figures
from dtrain.monitoring.host_list import compress_hosts, hosts_text
from dtrain.monitoring.machine_peak import measured_peak
from dtrain.monitoring.start_log import StartLog
from dtrain.planning.plan import make_plan
from dtrain.tasks.task import Task
from dtrain.tracking import TRACKERS
from dtrain.tracking.base import RunFacts, Tracker
from dtrain.training import train
from tests import tiny
from tests.conftest import ROOT
from tests.docs_reader import python_blocks
from tests.harness import train_in_threads
from tests.manifests import edit_manifest
from tests.refusals import refuses

CALLS: list[tuple[str, Mapping[str, Any]]] = []
"""The calls of all `Collecting` trackers."""


class Collecting(Tracker):
    """A user's tracker, which fails in the middle of the run."""

    def start(self, run: dict[str, Any], facts: RunFacts) -> None:
        CALLS.append(("start", run))

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        CALLS.append((kind, values))
        if kind == "eval":
            raise OSError("no space left")

    def close(self) -> None:
        CALLS.append(("close", {}))


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of a kind."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def train_alone(out: Path, **changes: Any) -> dict[str, Any]:
    """Train the tiny run on one rank."""
    return train(tiny.run(**changes), Comm(SingleBackend()), out)


def test_trackers_get_every_record_from_one_rank_and_change_nothing(tmp_path: Path) -> None:
    CALLS.clear()
    stages: dict[str, Any] = {"mesh__stages": 2}
    changes = {"log__trackers": ["tests.ranks.test_monitoring:Collecting", "csv"]} | stages
    tracked = train_in_threads(tiny.run(**changes), tmp_path / "a", 2, 2)
    plain = train_in_threads(tiny.run(**stages), tmp_path / "b", 2, 2)
    assert tracked["digest"] == plain["digest"]
    assert tracked["status"] == "finished"
    lines = map(json.loads, (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    assert [({"kind": kind} | dict(values)) for kind, values in CALLS[1:-1]] == list(lines)
    kinds = [kind for kind, _ in CALLS]
    assert kinds == ["start", "run", *2 * ["train", "eval", "checkpoint"], "close"]
    assert (tmp_path / "a" / "csv" / "train.csv").is_file()


def test_records_and_summary_hold_speed_and_spread(tmp_path: Path) -> None:
    summary = train_in_threads(tiny.run(mesh__stages=2), tmp_path, 2, 2)
    costs = make_plan(tiny.run(mesh__stages=2), 4).layout.block_layouts
    trained = records(tmp_path, "train")
    for record, speed in [*((r, r["samples_per_s"]) for r in trained), (summary, None)]:
        for key in ("step_s", "wait_s", "memory_bytes"):
            assert 0 <= record[key]["min"] <= record[key]["median"] <= record[key]["max"]
        expected = 2 * sum(block.cost for block in costs) * (speed or summary["samples_per_s"])
        assert record["tflops"] == pytest.approx(expected / 1e12)
        assert record["peak_share"] == pytest.approx(record["tflops"] / record["peak_tflops"])
        assert record["tokens_per_s"] is None
    keys = list(trained[0])
    head = ["kind", "time_s", "unix_s", "attempt", "update", "epoch", "loss", "samples_per_s"]
    assert keys[: len(head)] == head


def test_the_page_explains_every_key_of_a_record_and_every_tracker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its class is a tracker as it stands."""
    (code,) = python_blocks(ROOT / "docs" / "monitoring.md")
    (tmp_path / "tracker_of_the_page.py").write_text(code)
    changes: dict[str, Any] = {"epochs": 1, "log__trackers": ["tracker_of_the_page:Losses"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        train_alone(tmp_path / "out", **changes)
    assert "loss/2" in capsys.readouterr().out
    page = (ROOT / "docs" / "monitoring.md").read_text()
    explained = set(re.findall(r"`(\w+)`", page))
    position = {"kind", "time_s", "unix_s", "attempt", "update", "epoch", "loss"}
    assert records(tmp_path / "out", "train")[0].keys() - position <= explained
    assert explained >= TRACKERS.keys()


def test_spreads_are_per_update_and_the_peak_is_of_all_ranks() -> None:
    ranks = [
        {"wall_s": 8.0, "busy_s": busy, "memory_bytes": memory, "peak_flops": peak}
        for busy, memory, peak in ((8.0, 3, 1e12), (6.0, 1, 3e12), (2.0, 2, 9e12))
    ]
    assert rank_figures(ranks, 4) == {
        "step_s": {"min": 2.0, "median": 2.0, "max": 2.0},
        "wait_s": {"min": 0.0, "median": 0.5, "max": 1.5},
        "memory_bytes": {"min": 1, "median": 2, "max": 3},
        "peak_tflops": 9.0,
    }


@pytest.mark.parametrize(
    ("shape", "dtype", "positions"),
    [((7,), torch.int64, 7), ((4, 5), torch.int64, 20), ((), torch.int64, None)],
)
def test_positions_of_a_sample(
    shape: tuple[int, ...], dtype: torch.dtype, positions: int | None
) -> None:
    assert positions_per_sample(Task().bind(shape, dtype, 3)) == positions


def test_the_peak_is_measured_once_and_draws_no_numbers() -> None:
    state = torch.get_rng_state()
    peak = measured_peak(torch.device("cpu"), torch.float32)
    start = time.perf_counter()
    assert measured_peak(torch.device("cpu"), torch.float32) == peak > 1e6
    assert time.perf_counter() - start < 0.01
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["node1"], "node1"),
        (["node1", "node2", "node4"], "node[1-2,4]"),
        (["n009", "n010", "n011"], "n[009-011]"),
        (["login", "gpu7-ib", "gpu8-ib"], "login,gpu[7-8]-ib"),
        (["n9", "n10"], "n[9-10]"),
    ],
)
def test_hosts_are_compressed(names: list[str], text: str) -> None:
    assert compress_hosts(names) == text


def test_hosts_are_grouped_by_their_ranks() -> None:
    hosts = [f"node{number}" for number in (1, 2, 3) for _ in range(4)]
    assert hosts_text(hosts) == "node[1-3] x 4 ranks"
    assert hosts_text([*hosts, "node4"]) == "node[1-3] x 4 ranks, node4 x 1 rank"


def test_a_log_begins_with_its_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    train_alone(tmp_path, epochs=1)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("started ")
    assert "job 4711" in first
    assert first.endswith("x 1 rank")
    assert time.strftime("%Y-%m-%d") in first or time.strftime("%H:%M") < "00:10"


def test_a_slow_step_of_a_start_is_named_below_the_head(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StartLog(Comm(SingleBackend()))
    with log.step("reading data"):
        pass
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(start_log, "SLOW_STEP_S", 0.01)
    with log.step("reading data"):
        time.sleep(0.1)
    log.print_head()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["started", "start", "start"]
    assert "reading data" in lines[1]


def write_user(folder: Path, text: str) -> None:
    """Write the module of a user's model."""
    (folder / "my_net.py").write_text(
        "from torch import nn\n\n\nclass Middle(nn.Module):\n    def forward(self, x):\n"
        f"        return {text}\n\n\ndef net():\n    return nn.Sequential("
        "nn.Flatten(), nn.Linear(10, 6), Middle(), nn.Linear(6, 3))\n"
    )


def test_a_changed_text_of_the_model_is_named_on_resuming(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older checkpoint, which has no texts, resumes without a note."""
    import linecache
    import sys

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    out = tmp_path / "out"

    def note_of(epochs: int, text: str) -> bool:
        write_user(tmp_path, text)
        sys.modules.pop("my_net", None)
        linecache.clearcache()
        changes: dict[str, Any] = {"model": {"name": "my_net:net"}, "partition": {"blocks": 2}}
        train_alone(out, epochs=epochs, **changes)
        return "my_net:net: the text" in capsys.readouterr().out

    try:
        assert not note_of(1, "x.relu()")
        assert not note_of(2, "x.relu()")
        assert note_of(3, "x.tanh()")
        assert not note_of(4, "x.tanh()")
        assert records(out, "run")[2]["notes"] != records(out, "run")[3]["notes"] == []
        for checkpoint in (out / "checkpoints").iterdir():
            edit_manifest(checkpoint, lambda content: content["fingerprint"].pop("source"))
        assert not note_of(5, "x.relu()")
    finally:
        sys.modules.pop("my_net", None)


def spoiled_test() -> tuple[np.ndarray, ...]:
    """Return the tiny samples with one NaN in the test split."""
    x, y, x_test, y_test = tiny.samples()
    x_test = x_test.copy()
    x_test[16, 1, 3] = np.nan
    return x, y, x_test, y_test


def alike() -> tuple[np.ndarray, ...]:
    """Return the tiny samples with one label in the test split."""
    x, y, x_test, y_test = tiny.samples()
    return x, y, x_test, np.full_like(y_test, 2)


def test_a_test_split_with_nan_is_refused_at_the_start(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data__name": "tests.ranks.test_monitoring:spoiled_test"}
    with refuses(DataError, "data.not-finite") as caught:
        train_in_threads(tiny.run(mesh__stages=2, **changes), tmp_path / "out", 2, 2)
    assert all(word in str(caught.value) for word in ("sample 16", "test split", "channel 1"))
    assert not (tmp_path / "out").exists()


def test_nan_behind_the_limit_of_the_start_is_named_by_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.session.data_notes.CHECK_S", -1.0)
    changes: dict[str, Any] = {"data__name": "tests.ranks.test_monitoring:spoiled_test"}
    with refuses(DataError, "data.not-finite"):
        train_alone(tmp_path, **changes)


def test_labels_that_are_all_alike_are_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_alone(tmp_path, epochs=1, data__name="tests.ranks.test_monitoring:alike")
    (note,) = (line for line in capsys.readouterr().out.splitlines() if "all 17 labels" in line)
    assert "test split are 2" in note
    assert records(tmp_path, "run")[0]["notes"] == [note.removeprefix("note").strip()]
