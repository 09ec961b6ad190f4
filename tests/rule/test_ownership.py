"""Ownership of run folders: one run at a time, and none is locked out by a dead one."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from dtrain.checkpoint import ownership
from dtrain.errors import ConfigError
from tests.refusals import refuses

ELSEWHERE = {"host": "elsewhere", "machine": "other", "heartbeat_s": 0.02}
"""Changes an owner into one on another machine whose heart beats fast."""


def lock_as(folder: Path, change: dict[str, object]) -> dict[str, Any]:
    """Lock a folder in the name of another owner; return that."""
    owner = ownership.acquire(folder) | change
    (folder / "owner.json").write_text(json.dumps(owner))
    return owner


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    """The error names the owner and its file."""
    folder = tmp_path / "new" / "run"
    owner = ownership.acquire(folder)
    with refuses(ConfigError, "run-folder.locked") as caught:
        ownership.acquire(folder)
    assert f"process {os.getpid()}" in caught.value.message
    assert str(folder / "owner.json") in caught.value.message
    assert not ownership.release(folder, owner | {"process": 1})
    assert ownership.release(folder, owner)
    assert not ownership.release(folder, owner)
    ownership.acquire(folder)
    assert [path.name for path in folder.iterdir()] == ["owner.json"]


CONTENDER = """
import sys
from pathlib import Path
from dtrain.checkpoint import ownership, run_folder
from dtrain.errors import ConfigError
print("ready", flush=True)
sys.stdin.readline()
try:
    ownership.acquire(Path(sys.argv[1]))
    print("locked", flush=True)
except ConfigError:
    print("refused", flush=True)
sys.stdin.read()
"""


def test_one_of_many_processes_locks_a_folder(tmp_path: Path) -> None:
    """All start at once, and live until all have answered."""
    with ExitStack() as stack:
        argv = [sys.executable, "-c", CONTENDER, str(tmp_path)]
        processes = [
            stack.enter_context(Popen(argv, stdin=PIPE, stdout=PIPE, text=True)) for _ in range(4)
        ]
        assert [next_line(process) for process in processes] == ["ready"] * 4
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [next_line(process) for process in processes]
        assert sorted(answers) == ["locked"] + ["refused"] * 3


def next_line(process: Popen[str]) -> str:
    """Return the next line of output of a process."""
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
    ownership.acquire(tmp_path)
    owner = json.loads((tmp_path / "owner.json").read_text())
    (tmp_path / "owner.json").write_text(json.dumps(owner | change))
    ownership.acquire(tmp_path)
    assert json.loads((tmp_path / "owner.json").read_text()) == owner


OLD = {"host": "elsewhere", "machine": "other", "heartbeat_s": None}
"""Changes an owner into one that an earlier version wrote on another machine."""


@pytest.mark.parametrize("change", [{}, {"host": "elsewhere"}, OLD, OLD | {"job": "8"}])
def test_a_folder_whose_owner_may_live_is_refused(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "")
    owner = lock_as(tmp_path, change)
    with refuses(ConfigError, "run-folder.locked") as caught:
        ownership.acquire(tmp_path)
    assert str(owner["host"]) in caught.value.message


def test_the_error_names_the_job_to_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job on another host may be running or dead; the user can ask Slurm."""
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("PATH", "")
    lock_as(tmp_path, OLD | {"host": "n017"})
    monkeypatch.setenv("SLURM_JOB_ID", "124")
    with refuses(ConfigError, "run-folder.locked") as caught:
        ownership.acquire(tmp_path)
    message = caught.value.message
    assert "(job 123, restart 0, host n017, " in message
    assert "`squeue -j 123`" in message
    assert str(tmp_path / "owner.json") in message


def test_a_damaged_owner_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WRITING_S", 0.02)
    (tmp_path / "owner.json").write_text("{")
    ownership.acquire(tmp_path)
    assert json.loads((tmp_path / "owner.json").read_text())["process"] == os.getpid()


def test_an_owner_whose_heart_stands_still_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock_as(tmp_path, ELSEWHERE)
    ownership.acquire(tmp_path)
    assert "elsewhere" in capsys.readouterr().err
    assert (ownership.read_owner(tmp_path / "owner.json") or {})["process"] == os.getpid()


def test_an_owner_whose_heart_beats_is_refused(tmp_path: Path) -> None:
    lock_as(tmp_path, ELSEWHERE)
    heartbeat = ownership.Heartbeat(tmp_path, interval_s=0.02)
    with refuses(ConfigError, "run-folder.locked"):
        ownership.acquire(tmp_path)
    heartbeat.stop()
    ownership.acquire(tmp_path)


def test_the_clock_of_this_machine_does_not_decide(tmp_path: Path) -> None:
    """The file of a live owner seems hours old, or of tomorrow."""
    for offset in (-7200.0, 7200.0):
        owner = lock_as(tmp_path, ELSEWHERE)
        times = [time.time() + offset + beat for beat in range(40)]

        def beat(times: list[float] = times) -> None:
            for moment in times:
                os.utime(tmp_path / "owner.json", (moment, moment))
                time.sleep(0.005)

        thread = threading.Thread(target=beat)
        thread.start()
        time.sleep(0.01)
        if offset > 0:
            with refuses(ConfigError, "run-folder.locked"):
                ownership.acquire(tmp_path)
        thread.join()
        ownership.release(tmp_path, owner)


def test_a_heartbeat_touches_no_file_of_a_later_owner(tmp_path: Path) -> None:
    ownership.acquire(tmp_path)
    heartbeat = ownership.Heartbeat(tmp_path, interval_s=0.01)
    (tmp_path / "owner.json").unlink()
    ownership.acquire(tmp_path)
    os.utime(tmp_path / "owner.json", (1.0, 1.0))
    time.sleep(0.05)
    heartbeat.stop()
    assert (tmp_path / "owner.json").stat().st_mtime == 1.0


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a `squeue` first on the path."""
    folder.mkdir()
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


UNKNOWN = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
STEPS = 'case "$*" in *-s*) echo 9.2;; *) echo RUNNING;; esac'


@pytest.mark.parametrize(
    ("script", "step", "is_taken"),
    [
        (UNKNOWN, "0", True),
        ("echo PENDING", "0", True),
        ("echo FAILED", "0", True),
        (STEPS, "1", True),
        (STEPS, "2", False),
        ("echo RUNNING", None, False),
        ("echo SUSPENDED", "0", False),
    ],
)
def test_the_scheduler_knows_whether_a_job_runs(
    script: str,
    step: str | None,
    is_taken: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = {} if step is None else {"step": step}
    lock_as(tmp_path / "run", ELSEWHERE | {"job": "9", "heartbeat_s": 1e9} | steps)
    fake_squeue(tmp_path / "bin", monkeypatch, script)
    if is_taken:
        ownership.acquire(tmp_path / "run")
    else:
        with refuses(ConfigError, "run-folder.locked"):
            ownership.acquire(tmp_path / "run")


def test_a_scheduler_that_does_not_answer_leaves_it_to_the_heart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_as(tmp_path / "run", ELSEWHERE | {"job": "9"})
    fake_squeue(tmp_path / "bin", monkeypatch, "echo cannot connect >&2; exit 1")
    ownership.acquire(tmp_path / "run")


def test_a_container_of_the_same_host_name_is_no_dead_process(tmp_path: Path) -> None:
    """Its process number means nothing in this process table."""
    lock_as(tmp_path, {"machine": "other", "process": 2**22 + 1, "heartbeat_s": 0.02})
    heartbeat = ownership.Heartbeat(tmp_path, interval_s=0.02)
    with refuses(ConfigError, "run-folder.locked"):
        ownership.acquire(tmp_path)
    heartbeat.stop()


def test_containers_with_equal_names_and_process_numbers_lock_a_folder_once(
    tmp_path: Path,
) -> None:
    """Threads of one process have equal names, too; none disturbs the claim of another."""
    for attempt in range(20):
        barrier, answers = threading.Barrier(4), list[str]()

        def claim(folder: Path, barrier: threading.Barrier, answers: list[str]) -> None:
            barrier.wait()
            try:
                ownership.acquire(folder)
                answers.append("locked")
            except ConfigError as error:
                answers.append(error.key)

        folder = tmp_path / str(attempt)
        threads = [
            threading.Thread(target=claim, args=(folder, barrier, answers)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == ["locked"] + ["run-folder.locked"] * 3


def test_a_file_system_without_hard_links_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    owner = ownership.acquire(tmp_path)
    with refuses(ConfigError, "run-folder.locked"):
        ownership.acquire(tmp_path)
    ownership.check_owned(tmp_path, owner)
    assert ownership.release(tmp_path, owner)
    assert not any(tmp_path.iterdir())


def test_a_run_that_lost_its_folder_writes_nothing_more(tmp_path: Path) -> None:
    owner = ownership.acquire(tmp_path)
    lock_as_other = owner | {"process": 1}
    (tmp_path / "owner.json").write_text(json.dumps(lock_as_other))
    with refuses(ConfigError, "run-folder.taken-over"):
        ownership.check_owned(tmp_path, owner)
