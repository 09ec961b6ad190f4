"""Asynchronous checkpoints have the bits and the guarantees of synchronous ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dtrain.callbacks import Event
from dtrain.checkpoint import files, shard, store
from dtrain.checkpoint.inspection import list_checkpoints
from dtrain.checkpoint.manifest import checkpoint_names
from dtrain.comm.backends.threads import run_ranks
from dtrain.config.run import RunConfig
from dtrain.errors import SAVED_CODE, CheckpointError
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.session.session import Session
from dtrain.training import train
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
    updates, write_file = set[int](), shard.write_file_of_parts

    def write(path: Path, parts: Any, size: int, check: Callable[[], None]) -> str:
        while int(path.parent.stem[7:]) in updates:
            check()
            time.sleep(0.01)
        return write_file(path, parts, size, check)

    monkeypatch.setattr(shard, "write_file_of_parts", write)
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
    write_file = shard.write_file_of_parts

    def write(path: Path, *arguments: Any) -> str:
        if path.parent.name == "update-00000004.part" and path.name == "replica-0-stage-1.h5":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_file(path, *arguments)

    run = run_of(True, mesh__stages=2)
    with monkeypatch.context() as patch:
        patch.setattr(shard, "write_file_of_parts", write)
        with refuses(CheckpointError, "checkpoint.write-failed") as caught:
            train_in_threads(run, tmp_path / "parts", 2)
    assert caught.value.code == CheckpointError.code
    assert checkpoint_names(tmp_path / "parts" / "checkpoints") == ["update-00000002"]
    resumed = train_in_threads(run, tmp_path / "parts", 2)
    whole = train_in_threads(run, tmp_path / "whole", 2)
    assert {key: resumed[key] for key in COUNTED} == {key: whole[key] for key in COUNTED}
    assert not list((tmp_path / "parts" / "checkpoints").glob("*.part"))


def lose(folder: Path) -> None:
    """Lose the disk of a node."""
    shutil.rmtree(folder)


def damage(folder: Path) -> None:
    """Change a bit of the newest shard on a node."""
    path = folder / "update-00000006" / "replica-0-stage-1.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("accident", "restart"), [(None, 6), (damage, 4), (lose, 2)], ids=["none", "damage", "lose"]
)
def test_the_newest_checkpoint_that_all_nodes_hold_is_resumed(
    accident: Callable[[Path], None] | None,
    restart: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two hosts; the copies of the checkpoints after the first are not finished in time."""
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    out, hosts = tmp_path / "parts", ("a", "b")
    checkpoint = {"every": 2, "local": "$SCRATCH/disk"}
    held = {4, 6, 8}
    run, copy_file = tiny.run(checkpoint=checkpoint, mesh__stages=2), store.copy_file

    def copy(source: Path, target: Path, check: Callable[[], None]) -> str:
        while int(target.parent.stem[7:]) in held:
            check()
            time.sleep(0.01)
        return copy_file(source, target, check)

    def fail(session: Session, event: Event) -> None:
        is_copied = (out / "checkpoints" / "update-00000002").is_dir()
        if event.kind == "update" and event.update > 2 and not is_copied:
            time.sleep(0.3)
        if event.kind == "update" and event.update == 7:
            raise ZeroDivisionError

    monkeypatch.setattr(store, "copy_file", copy)
    with pytest.raises(ZeroDivisionError):
        run_ranks(2, lambda comm: train(run, comm, out, callbacks=[fail]), hosts=hosts)
    names = checkpoint_names(out / "checkpoints")
    assert names == ["update-00000002"]
    (disk,) = (tmp_path / "scratch" / "disk").iterdir()
    for host in hosts:
        assert checkpoint_names(disk / host) == ["update-00000004", "update-00000006"]
    local = [f"{host}:update-0000000{update}" for host in hosts for update in (4, 6)]
    rows = list_checkpoints(out, verify=True)
    assert [row.name for row in rows if not row.name.endswith(".part")] == [names[0], *local]
    assert not any(row.is_damaged for row in rows)
    held.clear()
    if accident is not None:
        accident(disk / "b")
    resumed = train_in_threads(run, out, 2, hosts=hosts)
    whole = train_in_threads(run_of(False, mesh__stages=2), tmp_path / "whole", 2, hosts=hosts)
    starts = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in starts if row["kind"] == "run"] == [0, restart]
    assert {key: resumed[key] for key in COUNTED} == {key: whole[key] for key in COUNTED}
    newest = "update-00000008"
    assert shards(out)[newest] == shards(tmp_path / "whole")[newest]
    assert not list(disk.glob("*/*"))


class BrokenDisk(files.FileCalls):
    """A disk that answers so many calls for checkpoints, and none afterwards."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def _count(self, path: object) -> None:
        is_counted = "checkpoints" in str(path)
        self.left -= is_counted
        if is_counted and self.left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def open(self, path: str | Path, flags: int) -> int:
        self._count(path)
        return super().open(path, flags)

    def fsync(self, descriptor: int) -> None:
        self._count(os.readlink(f"/proc/self/fd/{descriptor}"))
        super().fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._count(source)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._count(path)
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self._count(path)
        super().mkdir(path)

    def rmdir(self, path: Path) -> None:
        self._count(path)
        super().rmdir(path)


def test_every_point_of_a_save_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails before each call in turn; the next start is the undisturbed run."""
    run = run_of(True, mesh__stages=2, checkpoint__keep=1)
    expected = train_in_threads(run, tmp_path / "whole", 2)["digest"]
    points = 0
    while True:
        out, disk = tmp_path / str(points), BrokenDisk(points)
        with monkeypatch.context() as patch:
            patch.setattr(files, "calls", disk)
            with suppress(CheckpointError):
                train_in_threads(run, out, 2)
        if disk.left >= 0:
            break
        assert train_in_threads(run, out, 2)["digest"] == expected
        assert len(checkpoint_names(out / "checkpoints")) == 1
        points += 11
    assert points > 50
