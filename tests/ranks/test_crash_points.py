"""Crashes between any two system calls of a run, and every call that fails: nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.callbacks import Event
from dtrain.checkpoint import files, store
from dtrain.checkpoint.inspection import list_checkpoints
from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.checkpoint.resume import find_resume_point
from dtrain.checkpoint.run_folder import read_summary
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.errors import CheckpointError
from dtrain.session.session import Session
from dtrain.training import train
from tests import tiny
from tests.disk import POWER_CUTS, Folder, Mode, RecordingCalls


def short_run() -> RunConfig:
    """Return a run of three epochs with four updates each, and few tensors."""
    return tiny.run(
        epochs=3, model__widths=[5], partition__blocks=2, optimizer={"name": "sgd", "lr": 0.1},
        checkpoint={"best": "accuracy"},
    )  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """A run whose calls were recorded.

    Attributes
    ----------
    saved : list of (int, int)
        Calls after each save had returned, and its updates.
    """

    disk: RecordingCalls
    saved: list[tuple[int, int]]
    summary: dict[str, Any]

    def certain_update(self, calls: int) -> int:
        """Return the updates of the newest checkpoint whose save had returned."""
        return max((update for count, update in self.saved if count <= calls), default=0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Record a run of two stages, which saves its second checkpoint twice."""
    out = tmp_path_factory.mktemp("recorded") / "out"
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
        run = short_run()
        summary = run_ranks(2, lambda comm: train(run, comm, out, callbacks=[note]))[0]
    return Recorded(disk, saved, summary)


def crashes(disk: RecordingCalls) -> Iterator[tuple[int, Mode, dict[str, bytes | None]]]:
    """Yield every different state that a crash between two calls leaves."""
    seen = set[bytes]()
    for count in range(len(disk.changes) + 1):
        for mode in ("killed", "torn", *POWER_CUTS):
            state = disk.crash(count, mode, seed=count)
            key = hashlib.sha256(repr(sorted(state.items())).encode()).digest()
            if key not in seen:
                seen.add(key)
                yield count, mode, state


def with_dead_owner(state: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """Return a state whose owner file, if it is whole, names a process that has ended."""
    text = state.get("owner.json")
    return (
        state | {"owner.json": json.dumps(json.loads(text) | {"since": "0"}).encode()}
        if text
        else state
    )


def test_every_crash_leaves_a_whole_checkpoint_and_a_folder_that_resumes(
    recorded: Recorded, tmp_path: Path
) -> None:
    comm, folder = Comm(SingleBackend()), Folder(tmp_path / "out")
    for count, mode, state in crashes(recorded.disk):
        where = f"call {count}, {mode}"
        folder.show(state)
        point = find_resume_point(comm, folder.path, "auto")
        assert point.updates >= recorded.certain_update(count), where
        assert not point.damaged, where
        if mode in ("killed", "torn") and "checkpoints/" in state:
            rows = list_checkpoints(folder.path, verify=True)
            assert not any(row.is_damaged for row in rows), where
        if mode in ("killed", "torn") and "summary.json" in state:
            assert read_summary(folder.path) is not None, where
