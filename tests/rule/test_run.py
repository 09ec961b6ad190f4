"""The calendar, the shares of an update, and the run folder's ownership."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest

from dtrain.checkpoint import run_folder as folder
from dtrain.checkpoint.resume import check_same_run, find_checkpoint
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.data.sampler import BatchSplitter
from dtrain.errors import DtrainError
from dtrain.monitoring.run_totals import slowest_rank
from dtrain.schedules.segments import TrainingLength
from dtrain.train import train
from tests import tiny


@pytest.mark.parametrize(
    ("per_epoch", "total", "step"), list(product((1, 4, 7), (1, 7, 20), (1, 3, 9)))
)
def test_segments_follow_each_other_and_never_cross_an_epoch(
    per_epoch: int, total: int, step: int
) -> None:
    found = list(TrainingLength(per_epoch, total, step).segments())
    assert (found[0].start, found[-1].stop) == (0, total)
    assert all(a.stop == b.start for a, b in pairwise(found))
    for each in found:
        assert each.start == each.epoch * per_epoch + each.offset
        assert each.offset + each.stop - each.start <= per_epoch
        assert each.offset % step == 0
        assert each.stop - each.start <= step
        assert each.ends_epoch == (each.stop % per_epoch == 0)
    assert [each.ends_run for each in found] == [False] * (len(found) - 1) + [True]


def test_a_longer_run_goes_on_where_the_shorter_one_ended() -> None:
    """Resuming inside a segment of the longer run lands on the longer run's own bounds."""
    ends = {each.stop for each in TrainingLength(10, 30, 4).segments()}
    later = [each.stop for each in TrainingLength(10, 30, 4).segments(13)]
    assert later[0] == 14
    assert set(later) <= ends


def test_calendar_prefers_segment_then_checkpoint_then_epoch() -> None:
    assert TrainingLength.from_settings(10, 3, None, 4, 5) == TrainingLength(10, 30, 4)
    assert TrainingLength.from_settings(10, 3, None, 0, 5) == TrainingLength(10, 30, 5)
    assert TrainingLength.from_settings(10, None, 25, 0, 0) == TrainingLength(10, 25, 10)
    assert TrainingLength(10, 25, 10).epochs == 3


@pytest.mark.parametrize(
    ("size", "replicas", "micros"), list(product((5, 16), (1, 2, 3, 7), (1, 3, 4)))
)
def test_every_sample_of_an_update_is_somewhere_once(size: int, replicas: int, micros: int) -> None:
    shares, order = BatchSplitter(size, replicas, micros), np.random.default_rng(0).permutation(23)
    updates = -(-23 // size)
    sizes = shares.count_micro_batches(23, 0, updates)
    seen = []
    for update in range(updates):
        own = [shares.batch(order, update, replica) for replica in range(replicas)]
        assert max(each.local_rows for each in own) - min(each.local_rows for each in own) <= 1
        assert {each.rows for each in own} == {sum(each.local_rows for each in own)}
        for replica, each in enumerate(own):
            assert len(each.micro_batch_indices) == sizes[replica][update]
            lengths = [len(micro) for micro in each.micro_batch_indices]
            assert all(lengths)
            assert not lengths or max(lengths) - min(lengths) <= 1
            seen += [index for micro in each.micro_batch_indices for index in micro]
    assert seen == list(order)


def test_a_folder_is_taken_once(tmp_path: Path) -> None:
    token = folder.acquire(tmp_path / "new" / "run")
    with pytest.raises(DtrainError) as refusal:
        folder.acquire(tmp_path / "new" / "run")
    told = refusal.value.message
    assert f"process {os.getpid()}" in told
    assert str(tmp_path / "new" / "run" / "owner.json") in told
    assert not folder.release(tmp_path / "new" / "run", token | {"process": 1})
    assert folder.release(tmp_path / "new" / "run", token)
    assert not folder.release(tmp_path / "new" / "run", token)
    folder.acquire(tmp_path / "new" / "run")
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["owner.json"]


CONTENDER = """
import sys
from pathlib import Path
from dtrain.checkpoint import run_folder as folder
from dtrain.errors import DtrainError
print("ready", flush=True)
sys.stdin.readline()
try:
    folder.acquire(Path(sys.argv[1]))
    print("mine", flush=True)
except DtrainError:
    print("taken", flush=True)
sys.stdin.read()
"""


def test_of_many_that_want_a_folder_one_gets_it(tmp_path: Path) -> None:
    """All are let go at once, and live until all have been told."""
    with ExitStack() as stack:
        argv = [sys.executable, "-c", CONTENDER, str(tmp_path)]
        many = [
            stack.enter_context(Popen(argv, stdin=PIPE, stdout=PIPE, text=True)) for _ in range(6)
        ]
        assert [told(each) for each in many] == ["ready"] * 6
        for each in many:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        assert sorted(told(each) for each in many) == ["mine"] + ["taken"] * 5


def told(process: Popen[str]) -> str:
    """Return the next word of a process."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    "change",
    [{"process": 2**22 + 1}, {"since": "1"}, {"job": "7", "restart": "0", "host": "elsewhere"}],
)
def test_a_folder_whose_owner_is_gone_is_taken_over(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder.acquire(tmp_path)
    owner = json.loads((tmp_path / "owner.json").read_text())
    (tmp_path / "owner.json").write_text(json.dumps(owner | change))
    folder.acquire(tmp_path)
    assert json.loads((tmp_path / "owner.json").read_text()) == owner


@pytest.mark.parametrize("change", [{}, {"host": "elsewhere"}, {"job": "8", "host": "elsewhere"}])
def test_a_folder_whose_owner_may_live_is_refused(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder.acquire(tmp_path)
    owner = json.loads((tmp_path / "owner.json").read_text()) | change
    (tmp_path / "owner.json").write_text(json.dumps(owner))
    with pytest.raises(DtrainError, match=str(owner["host"])):
        folder.acquire(tmp_path)


def test_a_refusal_names_the_job_to_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job on another host may live or be dead; who can ask Slurm decides."""
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    owner = folder.acquire(tmp_path) | {"host": "n017"}
    (tmp_path / "owner.json").write_text(json.dumps(owner))
    monkeypatch.setenv("SLURM_JOB_ID", "124")
    with pytest.raises(DtrainError) as refusal:
        folder.acquire(tmp_path)
    told = refusal.value.message
    assert "belongs to a run that has not given it back (job 123, restart 0, host n017, " in told
    assert f"if `squeue -j 123` no longer shows it, delete {tmp_path / 'owner.json'}; else" in told


def test_a_full_disk_does_not_hide_how_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = folder.acquire(tmp_path)
    folder.write_summary(tmp_path, {"status": "running"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_summary", full)
    assert folder.release_unfinished(tmp_path, token, "failed", "DtrainError: the loss is nan")
    assert not (tmp_path / "owner.json").exists()
    assert not folder.release_unfinished(tmp_path, token, "failed", "another")


def test_records_of_an_earlier_attempt_are_put_aside(tmp_path: Path) -> None:
    for attempt, word in ((1, "first"), (2, "second"), (2, "second again")):
        (tmp_path / "flight").mkdir()
        (tmp_path / "flight" / "rank-00000.txt").write_text(word)
        folder.archive(tmp_path, "flight", attempt)
    folder.archive(tmp_path, "flight", 3)
    found = {path.parent.name: path.read_text() for path in tmp_path.glob("*/rank-*.txt")}
    assert found == {"flight-001": "first", "flight-002": "second again"}


def test_a_refusal_while_the_folder_is_taken_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(tiny.run(), path=tmp_path / "run.toml")

    def take(out: Path) -> folder.Owner:
        token = taken(out)
        (out / "letters.txt").touch()  # somebody else's, put there meanwhile
        return token

    taken = folder.acquire
    monkeypatch.setattr(folder, "acquire", take)
    with pytest.raises(DtrainError, match="not empty"):
        train(run, Comm(SingleBackend()), tmp_path / "out", "never")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letters.txt"]


def test_the_slowest_rank_is_compared_with_its_own_stage() -> None:
    busy = {0: 1.0, 1: 5.0, 2: 1.2, 3: 9.0, 4: 1.1, 5: 5.2}
    rows = [{"stage": rank % 2, "busy_s": busy[rank]} for rank in range(6)]
    told = slowest_rank(rows)
    assert told == {"slowest_rank": 3, "slowest_busy_s": 9.0, "stage_median_busy_s": 5.2}


def test_a_damaged_owner_file_owns_nothing(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_text("{")
    folder.acquire(tmp_path)
    assert json.loads((tmp_path / "owner.json").read_text())["process"] == os.getpid()


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").touch()
    with pytest.raises(DtrainError, match=r"no run folder \(letters.txt\)"):
        find_checkpoint(tmp_path, "auto")
    with pytest.raises(DtrainError, match="not empty"):
        find_checkpoint(tmp_path, "never")
    with pytest.raises(DtrainError, match="overwrite the run file"):
        check_same_run(tmp_path, None, replace(tiny.run(), path=tmp_path / "run.toml"))
    check_same_run(tmp_path, None, tiny.run())
    with pytest.raises(DtrainError, match="no complete checkpoint"):
        find_checkpoint(tmp_path / "new", str(tmp_path))
    with pytest.raises(DtrainError, match="cannot use the run folder"):
        folder.acquire(tmp_path / "letters.txt" / "run")
    assert find_checkpoint(tmp_path / "new", "auto") is None


@pytest.mark.parametrize(("replicas", "micros"), list(product((1, 2, 3, 7), (1, 3, 4))))
def test_no_part_is_smaller_than_it_must_be(replicas: int, micros: int) -> None:
    shares, order = BatchSplitter(9, replicas, micros, min_rows=2), np.arange(20)
    sizes = shares.count_micro_batches(20, 0, 3)
    seen = []
    for update, rows in enumerate((9, 9, 2)):
        own = [shares.batch(order, update, replica) for replica in range(replicas)]
        lengths = [len(micro) for each in own for micro in each.micro_batch_indices]
        assert sum(lengths) == rows
        assert min(lengths) >= 2
        assert [len(each.micro_batch_indices) for each in own] == [
            sizes[r][update] for r in range(replicas)
        ]
        seen += [index for each in own for micro in each.micro_batch_indices for index in micro]
    assert seen == list(order)
