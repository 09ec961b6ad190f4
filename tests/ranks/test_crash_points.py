"""Crashes between any two system calls of a run, and every call that fails: nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.callbacks import Event
from dtrain.checkpoint import files, store
from dtrain.checkpoint.inspection import list_checkpoints
from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.checkpoint.ownership import read_owner
from dtrain.checkpoint.resume import find_resume_point
from dtrain.checkpoint.run_folder import read_summary
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.errors import DtrainError
from dtrain.session.session import Session
from dtrain.training import train
from tests import tiny
from tests.disk import POWER_CUTS, Folder, Mode, RecordingCalls


def short_run(asynchronous: bool = False) -> RunConfig:
    """Return a run of three epochs with four updates each, and few tensors."""
    return tiny.run(
        epochs=3, model__widths=[5], partition__blocks=2, optimizer={"name": "sgd", "lr": 0.1},
        checkpoint={"best": "accuracy", "asynchronous": asynchronous},
    )  # fmt: skip


KILLS: tuple[Mode, ...] = ("killed", "torn")

RESUMED = 20
"""Crashes after which the run is trained to its end."""

RECORD_ERRORS = ("run-folder.unusable", "run-folder.write-failed")

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@dataclass(frozen=True)
class Recorded:
    """A run whose calls were recorded.

    Attributes
    ----------
    saved : list of (int, int)
        Calls after each save had returned, and its updates.
    pending : int
        Saves that may not be complete when they return.
    """

    out: Path
    disk: RecordingCalls
    saved: list[tuple[int, int]]
    summary: dict[str, Any]
    pending: int

    def certain_update(self, calls: int) -> int:
        """Return the updates of the newest checkpoint that was certainly complete."""
        saved = [update for count, update in self.saved if count <= calls]
        return [0, *saved[: len(saved) - self.pending]][-1]


def record(out: Path, asynchronous: bool) -> Recorded:
    """Record a run of two stages, which saves its second checkpoint twice."""
    out.mkdir()
    disk, saved, twice = RecordingCalls(out), list[tuple[int, int]](), list[int]()

    def note(session: Session, event: Event) -> None:
        if event.kind != "checkpoint":
            return
        if session.rank == 0:
            saved.append((len(disk.changes), event.update))
        if event.update == 8 and session.rank not in twice:
            twice.append(session.rank)
            session.save()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "calls", disk)
        run = short_run(asynchronous)
        summary = run_ranks(2, lambda comm: train(run, comm, out, callbacks=[note]))[0]
    return Recorded(out, disk, saved, summary, int(asynchronous))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Record a run."""
    return record(tmp_path_factory.mktemp("recorded") / "out", asynchronous=False)


def crashes(disk: RecordingCalls) -> Iterator[tuple[int, Mode, dict[str, bytes | None]]]:
    """Yield every different state that a crash between two calls leaves.

    After a power cut inside a row of writes, any part of the whole row may be there, too.
    """
    seen = set[bytes]()
    for count in range(len(disk.changes) + 1):
        cuts = () if disk.inside_writes(count) else POWER_CUTS
        for mode in (*KILLS, *cuts):
            state = disk.crash(count, mode, seed=count)
            key = hashlib.sha256(repr(sorted(state.items())).encode()).digest()
            if key not in seen:
                seen.add(key)
                yield count, mode, state


def end_owner(folder: Path) -> None:
    """Let whole owner files of a folder name a process that has ended, as after a crash."""
    for path in (*folder.glob("owner.json"), *folder.glob(".owner.json-*")):
        if (owner := read_owner(path)) is not None:
            path.write_text(json.dumps(owner | {"since": "0"}))


def names_below(folder: Path) -> set[str]:
    """Return the paths of files and folders, without shards and kept statistics."""
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".h5"}
    return paths - {"data-statistics.json"}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_every_crash_leaves_a_whole_checkpoint_and_a_folder_that_resumes(
    asynchronous: bool, tmp_path: Path
) -> None:
    recorded = record(tmp_path / "recorded", asynchronous)
    comm, folder = Comm(SingleBackend()), Folder(tmp_path / "out")
    for count, mode, state in crashes(recorded.disk):
        where = f"call {count}, {mode}"
        folder.show(state)
        point = find_resume_point(comm, folder.path, "auto")
        assert point.updates >= recorded.certain_update(count), where
        assert not point.damaged, where
        if "checkpoints/" in state:
            rows = list_checkpoints(folder.path, verify=True)
            assert not any(row.is_damaged for row in rows), where
        if mode in KILLS and "summary.json" in state:
            assert read_summary(folder.path) is not None, where


def test_crashed_runs_end_as_the_undisturbed_one_and_leave_nothing_behind(
    recorded: Recorded, tmp_path: Path
) -> None:
    """A sample of all crashes, each trained to the end on another number of ranks."""
    states = list(crashes(recorded.disk))
    for count, mode, state in states[:: len(states) // RESUMED]:
        out = tmp_path / f"{count}-{mode}"
        Folder(out).show(state)
        end_owner(out)
        summary = train(short_run(), Comm(SingleBackend()), out)
        for key in ("status", "digest", "updates", "samples", "test_loss", "best"):
            assert summary[key] == recorded.summary[key], (count, mode, key)
        left = names_below(out) - names_below(recorded.out)
        assert names_below(out) >= names_below(recorded.out), (count, mode)
        assert not (left if mode in KILLS else {path for path in left if "part" in path})
        shutil.rmtree(out)


class FailingCalls(files.FileCalls):
    """Lets one of the calls fail.

    Parameters
    ----------
    number : int
        Its number, from 0; -1: none.
    code : int
        Its error; 0: it writes half of the data, and succeeds.
    without : str
        Calls for files whose path has this part are not counted.
    """

    def __init__(self, number: int = -1, code: int = 0, without: str = "none") -> None:
        self.number, self.code, self.count, self.without = number, code, 0, without

    def __getattribute__(self, name: str) -> Any:
        call = object.__getattribute__(self, name)
        if name not in CALLS:
            return call

        def counted(*words: Any) -> Any:
            place = words[0]
            if isinstance(place, int):
                place = os.readlink(f"/proc/self/fd/{place}")
            self.count += self.without not in str(place)
            if self.without in str(place) or self.count - 1 != self.number:
                return call(*words)
            if self.code:
                raise OSError(self.code, os.strerror(self.code))
            if name == "write":
                return call(words[0], words[1][: max(1, len(words[1]) // 2)])
            return call(*words)

        return counted


CALLS = [name for name in vars(files.FileCalls) if not name.startswith("_")]


def error_key(work: Callable[[], object]) -> str | None:
    """Return the key of the error that `work` raises, if it does."""
    try:
        work()
    except DtrainError as error:
        return error.key
    return None


def save(folder: Path, update: int) -> None:
    """Save a small checkpoint."""
    tensors = {"model/a": torch.full((40,), float(update)), "replica/0/b": torch.ones(3)}
    store.save(folder, "shard", tensors, {}, {"update": update}, Comm(SingleBackend()), keep=2)


@pytest.mark.parametrize("code", [*ERRORS, 0])
def test_every_failing_call_of_a_save_is_reported_and_leaves_a_whole_checkpoint(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "first", 1)
    save(tmp_path / "first", 2)
    (tmp_path / "first" / "update-00000003.part").mkdir()
    calls = FailingCalls()
    monkeypatch.setattr(files, "calls", calls)
    shutil.copytree(tmp_path / "first", tmp_path / "whole")
    save(tmp_path / "whole", 3)
    total = calls.count
    for number in range(total):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", folder)
        monkeypatch.setattr(files, "calls", FailingCalls(number, code))
        failed = error_key(partial(save, folder, 3))
        assert failed == ("checkpoint.write-failed" if code else None), number
        newest = latest_checkpoint(folder)
        assert newest is not None
        update = newest.state["update"]
        assert update == 3 if not failed else update in (2, 3)
        assert newest.load(["model/a"])["model/a"].tolist() == [update] * 40
        monkeypatch.setattr(files, "calls", files.FileCalls())
        save(folder, 4)
        assert {path.name for path in folder.iterdir()} == {
            f"update-{update:08d}",
            "update-00000004",
        }


def test_a_run_whose_records_cannot_be_written_ends_with_an_error_of_its_own(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls outside of saves fail one after the other; then the same run resumes."""
    comm = Comm(SingleBackend())
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copytree(recorded.out / "checkpoints", begun / "checkpoints")
    shutil.rmtree(begun / "checkpoints" / "update-00000012")
    number, keys = 0, set[str | None]()
    while True:
        out = tmp_path / str(number)
        shutil.copytree(begun, out)
        calls = FailingCalls(number, errno.ENOSPC, without="checkpoints")
        monkeypatch.setattr(files, "calls", calls)
        keys.add(error_key(partial(train, short_run(), comm, out)))
        monkeypatch.setattr(files, "calls", files.FileCalls())
        if calls.count <= number:
            break
        if number % 6 == 0:
            end_owner(out)
            assert train(short_run(), comm, out)["digest"] == recorded.summary["digest"]
        number += 1
    assert keys == {None, *RECORD_ERRORS}
