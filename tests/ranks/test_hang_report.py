"""`dtrain flight`: the records of 512 ranks lead to the one that blocks all others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli import main
from dtrain.comm.flight_recorder import RECORD_KEYS, FlightRecorder, format_ranks
from dtrain.errors import ConfigError
from dtrain.monitoring.flight_request import find_processes
from dtrain.monitoring.hang_analysis import HangAnalysis
from dtrain.monitoring.hang_report import hang_report
from dtrain.monitoring.wait_graph import parse_ranks
from tests.conftest import ROOT
from tests.refusals import refuses

WORLD_SIZE, STAGES = 512, 16
WriteHang = Callable[[Path, int], None]
"""Writes the records of a hang in which one rank, of this number, has no record yet."""


def make_recorder(rank: int) -> FlightRecorder:
    """Return the recorder of a rank that is in a forward."""
    host = f"n{rank // 8:03d}"
    recorder = FlightRecorder(f"rank {rank} of {WORLD_SIZE} on {host}", rank, WORLD_SIZE, host)
    recorder.note("action", f"F{rank % STAGES}.0", "update", 117)
    return recorder


def write_record(out: Path, rank: int, **changes: Any) -> None:
    """Write the record of a rank, as `FlightRecorder.dump` does; it waits for none by default."""
    lines = make_recorder(rank).text("SIGUSR1").splitlines()
    fields = json.loads(lines[1])
    assert tuple(fields) == RECORD_KEYS
    path = out / "flight" / f"rank-{rank:05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it may be a link
    path.write_text("\n".join([lines[0], json.dumps(fields | changes), *lines[2:]]))


def wait_fields(description: str, *peers: int) -> dict[str, Any]:
    """Return the fields of a record whose rank waits for `peers`."""
    return {"wait_s": 600.0, "what": description, "peers": format_ranks(peers)}


def replicas_of(rank: int) -> range:
    """Return the ranks of a rank's stage."""
    return range(rank % STAGES, WORLD_SIZE, STAGES)


def write_hang(out: Path, cause: int) -> None:
    """Write the records of all ranks but `cause`: its stage waits in a mean, all other ranks for a
    neighbour."""
    for rank in range(WORLD_SIZE):
        if rank == cause:
            continue
        if rank % STAGES == cause % STAGES:
            mean = "a mean of 37 tensors of replicas with tag 7"
            write_record(out, rank, **wait_fields(mean, *replicas_of(rank)))
        elif rank % STAGES < cause % STAGES:
            credit = "a credit to send to rank 1 with tag 0"
            write_record(out, rank, **wait_fields(credit, rank + 1))
        else:
            message = "(8, 16) float32 from rank 1 with tag 0"
            write_record(out, rank, **wait_fields(message, rank - 1))


@pytest.fixture(scope="module")
def hang(tmp_path_factory: pytest.TempPathFactory) -> WriteHang:
    """`write_hang`, which writes once per cause and links the records afterwards."""
    folders: dict[int, Path] = {}

    def link_records(out: Path, cause: int) -> None:
        if cause not in folders:
            folders[cause] = tmp_path_factory.mktemp("hang")
            write_hang(folders[cause], cause)
        shutil.copytree(folders[cause], out, copy_function=os.link, dirs_exist_ok=True)

    return link_records


def test_of_512_ranks_the_one_that_waits_for_none_is_named(tmp_path: Path, hang: WriteHang) -> None:
    hang(tmp_path, 217)
    write_record(tmp_path, 217, idle_s=611.0, place="nets.py:14 in forward")
    late_clock = {"unix_s": time.time() + 90}
    write_record(tmp_path, 511, **wait_fields("(8, 16) float32 from rank 1", 510), **late_clock)
    lines = hang_report(tmp_path)
    assert "(SIGUSR1): 512 of 512 ranks answered" in lines[0]
    running = "running    rank 217 on n027: F9.0 of update 117 for 611 s, at nets.py:14 in forward"
    assert lines[1] == running
    text = "\n".join(lines)
    assert "waiting    511 of 512 ranks" in text
    mean = "(31 in all) wait for rank 217: a mean of 37 tensors of replicas with tag 7"
    assert mean in text
    assert "   rank 216 waits for rank 217: a credit to send to rank 1 with tag 0" in text
    assert "   rank 218 waits for rank 217: (8, 16) float32 from rank 1 with tag 0" in text
    assert "           478 more ranks wait for ranks that wait themselves" in text
    assert lines[-2].startswith("cause      likely rank 217 on n027: 511 of the other 511 ranks")
    assert lines[-1].startswith("to do      look at nets.py:14 in forward (stack in ")
    assert len(lines) < 10


def test_512_records_are_read_in_a_moment(tmp_path: Path, hang: WriteHang) -> None:
    hang(tmp_path, 217)
    start = time.perf_counter()
    hang_report(tmp_path)
    assert time.perf_counter() - start < 2.0


def write_nothing(out: Path) -> tuple[str, str]:
    """Leave the rank without a record; its host stands in `metrics.jsonl`."""
    run = {"kind": "run", "hosts": [f"h{rank}" for rank in range(WORLD_SIZE)]}
    (out / "metrics.jsonl").write_text(json.dumps(run) + "\n")
    line = "no answer  rank 300 on h300: ended, or not signalled; it has no record"
    return line, "check whether the rank still runs on h300"


def write_stale(out: Path) -> tuple[str, str]:
    """Write the record of an earlier request."""
    write_record(out, 300)
    os.utime(out / "flight" / "rank-00300.txt", (time.time() - 3600,) * 2)
    line = "no answer  rank 300 on n037: ended, or inside compiled code; its last record is of "
    return line, "check whether the rank still runs on n037"


def write_earlier_attempt(out: Path) -> tuple[str, str]:
    """Write the record of an earlier attempt."""
    (out / "flight-001").mkdir()
    (out / "flight-001" / "rank-00300.txt").touch()
    line = (
        "no answer  rank 300: ended, or not signalled; its last record is of an earlier attempt ("
    )
    return line, "check whether the rank still runs"


def write_damaged(out: Path) -> tuple[str, str]:
    """Write a record that is cut off."""
    (out / "flight" / "rank-00300.txt").write_text("rank 300\n{\n")
    return "no answer  rank 300: ended", "check whether the rank still runs"


def write_stacks(out: Path) -> tuple[str, str]:
    """Write stacks from C for two requests."""
    dump = (
        "Thread 0x1 (most recent call first):\n  File 'reader.py', line 2 in read\n"
        "Current thread 0x2 (most recent call first):\n  File 'nets.py', line {} in forward\n"
    )
    (out / "flight" / "rank-00300.stacks").write_text(dump.format(1) + dump.format(14))
    line = "no answer  rank 300: inside compiled code, File 'nets.py', line 14 in forward ("
    return line, "check devices and file systems of its host"


def write_failure(out: Path) -> tuple[str, str]:
    """Write the record of a failure."""
    failure = {"failed": True, "why": "ZeroDivisionError: none", "place": "nets.py:3 in forward"}
    write_record(out, 300, **failure)
    line = (
        "failed     rank 300 on n037: ZeroDivisionError: none, in F12.0 of update 117, "
        "at nets.py:3 in forward"
    )
    return line, "fix the error (traceback in "


@pytest.mark.parametrize(
    "write",
    [
        write_nothing,
        write_stale,
        write_earlier_attempt,
        write_damaged,
        write_stacks,
        write_failure,
    ],
)
def test_a_rank_that_others_wait_for_leads(
    tmp_path: Path, hang: WriteHang, write: Callable[[Path], tuple[str, str]]
) -> None:
    """Rank 5 waits for none either, and blocks no other."""
    hang(tmp_path, 300)
    write_record(tmp_path, 5)
    line, advice = write(tmp_path)
    lines = hang_report(tmp_path)
    assert lines[1].startswith(line), lines[1]
    assert lines[2].startswith("running    rank 5 on n000")
    assert "likely rank 300" in lines[-2]
    assert lines[-1].startswith(f"to do      {advice}")


def test_a_failure_leads_before_a_rank_that_blocks_others(tmp_path: Path, hang: WriteHang) -> None:
    hang(tmp_path, 217)
    write_record(tmp_path, 217)
    write_record(tmp_path, 5, failed=True, why="KeyError: 'a'")
    assert hang_report(tmp_path)[1].startswith("failed     rank 5 on n000: KeyError")


def test_a_deadlock_is_named(tmp_path: Path) -> None:
    for rank in range(WORLD_SIZE):
        write_record(tmp_path, rank, **wait_fields("(8, 16) float32", rank ^ 1))
    lines = hang_report(tmp_path)
    assert "deadlock   ranks 0-511 wait only for each other" in lines[-2]
    assert not any(line.startswith("cause") for line in lines)
    assert "report it with the folder" in lines[-1]


def test_a_mean_that_all_have_joined_is_no_ranks_fault(tmp_path: Path) -> None:
    for rank in range(WORLD_SIZE):
        write_record(tmp_path, rank, **wait_fields("a mean", *range(WORLD_SIZE)))
    assert "messages that the network does not deliver" in hang_report(tmp_path)[-2]


def test_many_ranks_that_wait_for_none_take_few_lines(tmp_path: Path) -> None:
    for rank in range(WORLD_SIZE):
        write_record(tmp_path, rank)
    lines = hang_report(tmp_path)
    assert len(lines) < 12
    assert sum("504 more ranks" in line for line in lines) == 1
    assert not HangAnalysis(tmp_path).is_stuck()


def test_a_run_is_stuck_by_the_age_of_its_waits(tmp_path: Path) -> None:
    """Young waits are those of a healthy run; a rank with an event since then is not stuck."""
    write_record(tmp_path, 0)
    for wait_s, stuck in ((0.2, False), (9.0, False), (11.0, True)):
        write_record(tmp_path, 1, **wait_fields("a mean", 0) | {"wait_s": wait_s})
        assert HangAnalysis(tmp_path).is_stuck() is stuck
        causes = [line for line in hang_report(tmp_path) if line.startswith(("cause", "deadlock"))]
        assert bool(causes) is stuck
    (before,) = (r for r in HangAnalysis(tmp_path).current_records.values() if r.rank == 1)
    write_record(tmp_path, 1, unix_s=before.fields["unix_s"] + 0.5, idle_s=0.3)
    later = HangAnalysis(tmp_path, {1: before})
    assert (later.moved_ranks, later.is_stuck()) == ({1}, False)
    write_record(tmp_path, 1, unix_s=before.fields["unix_s"] + 0.5, idle_s=30.0)
    later = HangAnalysis(tmp_path, {1: before})
    assert (later.moved_ranks, later.is_stuck()) == (set(), True)
    write_record(tmp_path, 1, failed=True)
    assert HangAnalysis(tmp_path).is_stuck()


LIVE_RANK = """
import os, sys, time
from pathlib import Path
from dtrain.comm.flight_recorder import FlightRecorder
import signal

recorder = FlightRecorder("rank 0 of 1", 0, 1, "here")
recorder.dump_on_signal(signal.SIGURG)
recorder.set_folder(Path(sys.argv[1]) / "flight")
recorder.note("action", "F0.0", "update", 0)
child = os.fork()  # holds the file, too
print(flush=True)
deadline = time.monotonic() + 30
while child and time.monotonic() < deadline:
    time.sleep(0.01)
    if sys.argv[2] == "works":
        recorder.note("action", "F0.0", "update", 1)
if not child:
    time.sleep(30)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("state", ["works", "hangs"])
def test_live_ranks_of_this_host_are_asked_twice(tmp_path: Path, state: str) -> None:
    """Without a signal of the user; the process that a rank has forked is not asked."""
    command = [sys.executable, "-c", LIVE_RANK, str(tmp_path), state]
    rank = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, process_group=0)
    try:
        assert rank.stdout is not None
        rank.stdout.readline()
        assert find_processes(tmp_path) == {0: rank.pid}
        assert find_processes(tmp_path / "other") == {}
        lines = hang_report(tmp_path, stuck_s=0.4)
        assert "1 of 1 ranks answered" in lines[0]
        (record,) = (tmp_path / "flight").glob("*.txt")
        assert f"process {rank.pid}" in record.read_text()
        assert any(line.startswith("stuck ") for line in lines) is (state == "works")
    finally:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def test_a_folder_without_records_is_refused_with_how_to_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with refuses(ConfigError, "flight.no-records"):
        HangAnalysis(tmp_path)
    assert main(["flight", str(tmp_path)]) == ConfigError.code
    assert "kill -URG" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text('{"status": "finished"}')
    with refuses(ConfigError, "flight.not-running"):
        hang_report(tmp_path)


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path, 1, **wait_fields("x", 0))
    recorder = make_recorder(0)
    recorder.folder = tmp_path / "flight"
    recorder.dump("SIGUSR1")
    assert main(["flight", str(tmp_path)]) == 0
    assert "likely rank 0 on n000" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "3", "0-3", "0-3,8", "0,2,4-511"])
def test_parsing_and_formatting_ranks_are_inverse(text: str) -> None:
    assert format_ranks(parse_ranks(text)) == text


def test_many_ranks_are_short_text() -> None:
    assert format_ranks(range(WORLD_SIZE)) == "0-511"
    assert format_ranks([8, 1, 0, 3, 2, 3]) == "0-3,8"
    assert os.linesep not in format_ranks(range(0, WORLD_SIZE, 2))
