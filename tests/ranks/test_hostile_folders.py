"""Run folders that somebody else wrote, and files that somebody else may read."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.checkpoint import ownership
from dtrain.checkpoint.safe_files import read_json
from dtrain.cli import main
from dtrain.monitoring.hang_report import hang_report
from tests import fuzz, tiny
from tests.harness import train_in_threads


def test_changed_files_end_in_no_traceback_and_no_hang() -> None:
    """A few of the trials of `make fuzz`: nothing outside of the folder is opened or changed."""
    found = fuzz.run_trials(range(100), seed=0, reports=0.0)
    assert found == [], "\n".join(trial.problem for trial in found)


def test_a_change_that_does_harm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials notice a traceback, an open file of another folder, and a write."""

    def harmful(folder: Path, good: Path, out: Path) -> dict[str, object]:
        outside = folder.parent / "outside" / "secret"
        actions = {
            "reads": outside.read_text,
            "writes": lambda: (folder / "new").write_text("x"),
            "raises": lambda: [][1],
        }
        name = next(kinds)
        return dict.fromkeys(fuzz.OTHERS + sum(fuzz.READERS.values(), ()), actions[name])

    kinds: Iterator[str] = iter(("reads", "writes", "raises"))
    monkeypatch.setattr(fuzz, "commands", harmful)
    found = fuzz.run_trials(range(3), seed=0, reports=0.0)
    for fact, trial in zip(("opened", "new", "IndexError"), found, strict=True):
        assert fact in trial.problem


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    """Those of a run, its checkpoints and its owner, and an export."""
    before = os.umask(0o027)
    try:
        train_in_threads(
            tiny.run(mesh__stages=2, trace=True, checkpoint__best="loss"), tmp_path / "out", 2
        )
        assert main(["export", str(tmp_path / "out"), str(tmp_path / "model.pt")]) == 0
        assert main(["checkpoint", "verify", str(tmp_path / "out")]) == 0
        ownership.acquire(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) > 15
    expected = {path: 0o750 if Path(path).is_dir() else 0o640 for path in modes}
    assert modes == expected


@pytest.mark.parametrize(
    "field",
    [
        {"rank": 3},
        {"rank": -1},
        {"size": 10**9},
        {"peers": "0-999999999"},
        {"peers": "x"},
        {"idle_s": "long"},
        {"wait_s": "x"},
        {"unix_s": None},
    ],
)
def test_a_flight_record_that_no_rank_writes_is_left_out(
    field: dict[str, object], tmp_path: Path
) -> None:
    good = {"rank": 0, "size": 3, "host": "a", "unix_s": 1.0, "wait_s": 2.0, "idle_s": 2.0}
    good |= {"failed": False, "why": "SIGURG", "what": "recv", "peers": "2", "update": 7}
    good |= {"action": "F0.1", "place": None}
    (tmp_path / "flight").mkdir()
    for rank, fields in enumerate((good, good | {"rank": 1} | field)):
        text = f"rank {rank}\n{json.dumps(fields)}\n"
        (tmp_path / "flight" / f"rank-0000{rank}.txt").write_text(text)
    assert "1 of 3 ranks answered" in hang_report(tmp_path)[0]


def test_an_owner_that_is_no_process_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is a path would be read below /proc."""
    monkeypatch.setattr(ownership, "WRITING_S", 0.02)
    (tmp_path / "owner.json").write_text(
        json.dumps({"process": "../tmp/x", "machine": ownership._machine()})
    )
    ownership.acquire(tmp_path)
    assert read_json(tmp_path, "owner.json")["process"] == os.getpid()
