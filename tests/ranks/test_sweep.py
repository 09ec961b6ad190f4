"""`dtrain train` of a run file with a sweep: every run once, one table, a failed run is no end."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dtrain import cli
from dtrain.errors import NumericalError
from tests.outcome import summary
from tests.system.programs import run_in_process

RUN = """updates = 3
batch-size = 60
threads = 1
[data]
name = "digits"
validation = 0.1
[model]
name = "mlp"
widths = [8]
[optimizer]
name = "sgd"
lr = 0.1
[sweep]
optimizer.lr = [1e30, 0.1, 0.01]
"""
NAMES = [f"optimizer.lr={value}" for value in ("0.1", "0.01", "1e+30")]
"""The runs, the best first; the last one fails."""


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run file in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.toml"
    path.write_text(RUN)
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of the table of a sweep."""
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_runs_of_a_sweep_are_trained_one_after_the_other(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the ranks of this process; again with more updates; and one of them alone."""
    folder = run_file.parent / "runs" / "net"
    for updates in (3, 4):
        words = ["train", str(run_file), "--set", f"updates={updates}"]
        assert run_in_process(*words) == NumericalError.code
        table = rows(folder)
        assert [row["run"] for row in table] == NAMES
        assert [row["status"] for row in table] == ["finished", "finished", "failed"]
        assert [row["updates_done"] for row in table[:2]] == [f"{updates}.0"] * 2
        assert table[2]["error_key"] == "training.loss-not-finite"
        assert [float(row["optimizer.lr"]) for row in table] == [0.1, 0.01, 1e30]
        best, second = (float(row["validation_accuracy"]) for row in table[:2])
        assert best > second
    capsys.readouterr()
    assert run_in_process(*["status", str(folder), "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == NAMES
    alone = ["--set", "optimizer.lr=0.01", "--set", "updates=4", "--out", "alone"]
    assert run_in_process(*["train", str(run_file), *alone]) == 0
    assert summary(Path("alone"))["digest"] == summary(folder / NAMES[1])["digest"]


def test_each_run_has_new_ranks_and_a_finished_one_is_skipped(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--ranks`, with this process in place of the ranks; a run that is stopped ends the sweep."""
    started: list[str] = []

    def start(ranks: int, argv: Sequence[str], environ: Mapping[str, str]) -> int:
        started.append(argv[argv.index("--out") + 1])
        return run_in_process(*argv[argv.index("train") :])

    monkeypatch.setattr(cli, "start_ranks", start)
    words = ["train", str(run_file), "--ranks", "1", "--out", "runs/{name}-{data.validation}"]
    assert run_in_process(*words) == NumericalError.code
    folder = Path("runs/net-0.1")
    assert started == [str(folder / name) for name in (NAMES[2], *NAMES[:2])]
    assert [row["run"] for row in rows(folder)] == NAMES
    started.clear()
    monkeypatch.setattr(cli, "start_ranks", lambda *words: started.append("") or 75)
    assert run_in_process(*words) == 75
    assert len(started) == 1
    only = [*words[:-2], "--set", "optimizer.lr=0.1", "--out", str(folder / NAMES[0])]
    monkeypatch.setattr(cli, "start_ranks", start)
    assert run_in_process(*only) == 0  # finished before; the folder is that of the run
    assert not (folder / NAMES[0] / "sweep.csv").exists()
