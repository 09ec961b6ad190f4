"""The length of a run, the samples of its updates, and the ownership of its folder."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from dtrain.checkpoint import ownership, run_folder
from dtrain.checkpoint.resume import find_checkpoint
from dtrain.checkpoint.same_run import check_same_run
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.data.sampler import BatchSplitter
from dtrain.errors import ConfigError
from dtrain.monitoring.run_totals import slowest_rank
from dtrain.schedules.segments import TrainingLength
from dtrain.training import train
from tests import tiny
from tests.refusals import refuses


@pytest.mark.parametrize(
    ("per_epoch", "total", "step"), list(product((1, 4, 7), (1, 7, 20), (1, 3, 9)))
)
def test_segments_follow_each_other_and_never_cross_an_epoch(
    per_epoch: int, total: int, step: int
) -> None:
    segments = list(TrainingLength(per_epoch, total, step).segments())
    assert (segments[0].start, segments[-1].stop) == (0, total)
    assert all(a.stop == b.start for a, b in pairwise(segments))
    for segment in segments:
        assert segment.start == segment.epoch * per_epoch + segment.offset
        assert segment.offset + segment.stop - segment.start <= per_epoch
        assert segment.offset % step == 0
        assert segment.stop - segment.start <= step
        assert segment.ends_epoch == (segment.stop % per_epoch == 0)
    assert [segment.ends_run for segment in segments] == [False] * (len(segments) - 1) + [True]


@pytest.mark.parametrize(("per_epoch", "interval"), list(product((4, 7), (1, 3, 10))))
def test_segments_end_where_evaluations_are_due(per_epoch: int, interval: int) -> None:
    """The interval counts from the start of the run, over the ends of epochs."""
    plain = {segment.stop for segment in TrainingLength(per_epoch, 25, 3).segments()}
    ends = {segment.stop for segment in TrainingLength(per_epoch, 25, 3, interval).segments()}
    assert ends == plain | set(range(interval, 26, interval))


def test_a_longer_run_resumes_where_the_shorter_one_ended() -> None:
    """Resuming inside a segment of the longer run ends it where the longer run does."""
    ends = {segment.stop for segment in TrainingLength(10, 30, 4).segments()}
    resumed_ends = [segment.stop for segment in TrainingLength(10, 30, 4).segments(13)]
    assert resumed_ends[0] == 14
    assert set(resumed_ends) <= ends


def test_the_segment_defaults_to_the_checkpoint_interval_then_to_the_epoch() -> None:
    assert TrainingLength.from_settings(10, 3, None, 4, 5) == TrainingLength(10, 30, 4)
    assert TrainingLength.from_settings(10, 3, None, 0, 5) == TrainingLength(10, 30, 5)
    assert TrainingLength.from_settings(10, None, 25, 0, 0) == TrainingLength(10, 25, 10)
    assert TrainingLength(10, 25, 10).epochs == 3


@pytest.mark.parametrize(
    ("size", "replicas", "micros"), list(product((5, 16), (1, 2, 3, 7), (1, 3, 4)))
)
def test_every_sample_of_an_update_is_in_one_micro_batch(
    size: int, replicas: int, micros: int
) -> None:
    splitter = BatchSplitter(size, replicas, micros)
    order = np.random.default_rng(0).permutation(23)
    updates = -(-23 // size)
    counts = splitter.count_micro_batches(23, 0, updates)
    indices = []
    for update in range(updates):
        batches = [splitter.batch(order, update, replica) for replica in range(replicas)]
        rows = [batch.local_rows for batch in batches]
        assert max(rows) - min(rows) <= 1
        assert {batch.rows for batch in batches} == {sum(rows)}
        for replica, batch in enumerate(batches):
            assert len(batch.micro_batch_indices) == counts[replica][update]
            lengths = [len(micro) for micro in batch.micro_batch_indices]
            assert all(lengths)
            assert not lengths or max(lengths) - min(lengths) <= 1
            indices += [index for micro in batch.micro_batch_indices for index in micro]
    assert indices == list(order)


def test_a_full_disk_does_not_hide_how_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = ownership.acquire(tmp_path)
    run_folder.write_summary(tmp_path, {"status": "running"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.files, "replace_file", full)
    assert run_folder.release_unfinished(tmp_path, owner, "failed", "the loss is nan")
    assert not (tmp_path / "owner.json").exists()
    assert not run_folder.release_unfinished(tmp_path, owner, "failed", "another")


def test_records_of_an_earlier_attempt_are_archived(tmp_path: Path) -> None:
    for attempt, text in ((1, "first"), (2, "second"), (2, "second again")):
        (tmp_path / "flight").mkdir()
        (tmp_path / "flight" / "rank-00000.txt").write_text(text)
        run_folder.archive(tmp_path, "flight", attempt)
    run_folder.archive(tmp_path, "flight", 3)
    archived = {path.parent.name: path.read_text() for path in tmp_path.glob("*/rank-*.txt")}
    assert archived == {"flight-001": "first", "flight-002": "second again"}


def test_an_error_while_the_folder_is_locked_unlocks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(tiny.run(), path=tmp_path / "run.toml")

    def acquire_late(out: Path) -> ownership.Owner:
        owner = acquire(out)
        (out / "letters.txt").touch()  # another program's, written meanwhile
        return owner

    acquire = ownership.acquire
    monkeypatch.setattr(ownership, "acquire", acquire_late)
    with refuses(ConfigError, "run-folder.not-empty"):
        train(run, Comm(SingleBackend()), tmp_path / "out", "never")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letters.txt"]


def test_the_slowest_rank_is_compared_with_its_own_stage() -> None:
    busy = {0: 1.0, 1: 5.0, 2: 1.2, 3: 9.0, 4: 1.1, 5: 5.2}
    rows = [{"stage": rank % 2, "busy_s": busy[rank]} for rank in range(6)]
    slowest = slowest_rank(rows)
    assert slowest == {"slowest_rank": 3, "slowest_busy_s": 9.0, "stage_median_busy_s": 5.2}


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").touch()
    with refuses(ConfigError, "run-folder.other-files"):
        find_checkpoint(tmp_path, "auto")
    with refuses(ConfigError, "run-folder.not-empty"):
        find_checkpoint(tmp_path, "never")
    with refuses(ConfigError, "run-folder.overwrites-run-file"):
        check_same_run(tmp_path, None, replace(tiny.run(), path=tmp_path / "run.toml"))
    check_same_run(tmp_path, None, tiny.run())
    with refuses(ConfigError, "run-folder.no-resume-checkpoint"):
        find_checkpoint(tmp_path / "new", str(tmp_path))
    with refuses(ConfigError, "run-folder.unusable"):
        ownership.acquire(tmp_path / "letters.txt" / "run")
    assert find_checkpoint(tmp_path / "new", "auto") is None


@pytest.mark.parametrize(("replicas", "micros"), list(product((1, 2, 3, 7), (1, 3, 4))))
def test_no_micro_batch_is_smaller_than_the_minimum(replicas: int, micros: int) -> None:
    splitter, order = BatchSplitter(9, replicas, micros, min_rows=2), np.arange(20)
    counts = splitter.count_micro_batches(20, 0, 3)
    indices = []
    for update, rows in enumerate((9, 9, 2)):
        batches = [splitter.batch(order, update, replica) for replica in range(replicas)]
        lengths = [len(micro) for batch in batches for micro in batch.micro_batch_indices]
        assert sum(lengths) == rows
        assert min(lengths) >= 2
        assert [len(batch.micro_batch_indices) for batch in batches] == [
            counts[replica][update] for replica in range(replicas)
        ]
        for batch in batches:
            indices += [index for micro in batch.micro_batch_indices for index in micro]
    assert indices == list(order)
