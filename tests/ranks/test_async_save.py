"""Asynchronous checkpoints have the bits and the guarantees of synchronous ones."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.callbacks import Event
from dtrain.checkpoint import shard
from dtrain.checkpoint.manifest import checkpoint_names
from dtrain.config.run import RunConfig
from dtrain.errors import SAVED_CODE, CheckpointError
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.session.session import Session
from tests import tiny
from tests.harness import train_in_threads
from tests.ranks.test_early_end import COUNTED, records, stop_at, train_until_stopped
from tests.refusals import refuses

SYNCS = ("every-step", "local-sgd", "daso", "ab", "oialr", "demo", "powersgd")
"""Without state, with replicas that diverge, and with every kind of state."""

WRITER = "dtrain-checkpoint"


def run_of(asynchronous: bool, sync: str = "every-step", **changes: Any) -> RunConfig:
    """Return a run of two epochs of four updates, saved after every second update."""
    checkpoint = {"every": 2, "keep": 9, "asynchronous": asynchronous}
    return tiny.run(checkpoint=checkpoint, sync__name=sync, **changes)


def shards(out: Path) -> dict[str, Any]:
    """Return bytes, hash and keys of every shard, by checkpoint."""
    return {
        name: json.loads((out / "checkpoints" / name / "manifest.json").read_text())["shards"]
        for name in checkpoint_names(out / "checkpoints")
    }


@pytest.mark.parametrize("sync", SYNCS)
def test_they_have_the_bits_of_synchronous_ones(sync: str, tmp_path: Path) -> None:
    """On two stages and two replicas; the planned copies are the counted ones."""
    summaries, planned = [], []
    for asynchronous in (False, True):
        ema = {"ema": {"decay": 0.9}} if sync == "every-step" else {}
        run = run_of(asynchronous, sync, mesh__stages=2, **ema)
        planned.append([rank.peak for rank in MemoryPlan(make_plan(run, 4)).rank_memory()])
        summaries.append(train_in_threads(run, tmp_path / str(asynchronous), 2, 2))
    assert shards(tmp_path / "True") == shards(tmp_path / "False")
    assert len(shards(tmp_path / "True")) == 4
    for key in COUNTED:
        assert summaries[0][key] == summaries[1][key], key
    for kind in ("train", "eval"):
        assert records(tmp_path / "True", kind) == records(tmp_path / "False", kind)
    for rank in range(4):
        copies = summaries[1]["peak_memory_bytes"][rank] - summaries[0]["peak_memory_bytes"][rank]
        plan = planned[1][rank] - planned[0][rank]
        assert copies <= 1.05 * plan, (copies, plan)
        if sync == "every-step":
            assert copies >= 0.95 * plan, (copies, plan)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return a set: the checkpoint of an update in it is not written."""
    updates, write_parts = set[int](), shard.write_parts

    def write(path: Path, parts: Any, check: Callable[[], None]) -> tuple[int, str]:
        while int(path.parent.stem[7:]) in updates:
            check()
            time.sleep(0.01)
        return write_parts(path, parts, check)

    monkeypatch.setattr(shard, "write_parts", write)
    return updates


def test_a_stopped_run_waits_for_the_pending_one_and_saves(held: set[int], tmp_path: Path) -> None:
    """The next start, on other ranks, is the undisturbed run."""
    run, checkpoints = run_of(True, mesh__stages=2), tmp_path / "parts" / "checkpoints"
    stop = stop_at(3, {1})
    held.add(2)

    def callback(session: Session, event: Event) -> None:
        stop(session, event)
        if event.kind == "update" and event.update == 3 and session.rank == 1:
            assert checkpoint_names(checkpoints) == []
            assert (checkpoints / "update-00000002.part").is_dir()
            held.clear()

    ends = train_until_stopped(run, tmp_path / "parts", 2, callback)
    assert ends == [(SAVED_CODE, "interrupted.saved")] * 2
    first, second = checkpoint_names(checkpoints)
    assert first == "update-00000002"
    assert second > first
    resumed = train_in_threads(run_of(True, mesh__stages=3), tmp_path / "parts", 3)
    whole = train_in_threads(run, tmp_path / "whole", 2)
    for key in ("digest", "updates", "samples", "train_loss", "test_loss", "status"):
        assert resumed[key] == whole[key], key


def test_a_run_that_fails_discards_the_pending_one(held: set[int], tmp_path: Path) -> None:
    held.add(4)

    def fail(session: Session, event: Event) -> None:
        if event.kind == "update" and event.update == 5 and session.rank == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_until_stopped(run_of(True, mesh__stages=2), tmp_path, 2, fail)
    assert not [thread for thread in threading.enumerate() if thread.name == WRITER]
    assert checkpoint_names(tmp_path / "checkpoints") == ["update-00000002"]
    assert not (tmp_path / "owner.json").exists()


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts = shard.write_parts

    def write(path: Path, *arguments: Any) -> tuple[int, str]:
        if path.parent.name == "update-00000004.part" and path.name == "replica-0-stage-1.h5":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_parts(path, *arguments)

    run = run_of(True, mesh__stages=2)
    with monkeypatch.context() as patch:
        patch.setattr(shard, "write_parts", write)
        with refuses(CheckpointError, "checkpoint.write-failed") as caught:
            train_in_threads(run, tmp_path / "parts", 2)
    assert caught.value.code == CheckpointError.code
    assert checkpoint_names(tmp_path / "parts" / "checkpoints") == ["update-00000002"]
    resumed = train_in_threads(run, tmp_path / "parts", 2)
    whole = train_in_threads(run, tmp_path / "whole", 2)
    assert {key: resumed[key] for key in COUNTED} == {key: whole[key] for key in COUNTED}
    assert not list((tmp_path / "parts" / "checkpoints").glob("*.part"))
