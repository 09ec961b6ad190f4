"""`dtrain flight`: from the records of 512 ranks to the one that all others wait for."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli import main
from dtrain.comm.flight_recorder import RECORD_KEYS, FlightRecorder, format_ranks
from dtrain.errors import DtrainError
from dtrain.monitoring.hang_report import HangAnalysis, hang_report, parse_ranks

SIZE, STAGES = 512, 16
Hang = Callable[[Path, int], None]


def working(rank: int) -> FlightRecorder:
    """Return the recorder of a rank that is at work."""
    flight = FlightRecorder(
        f"rank {rank} of {SIZE} on n{rank // 8:03d}", rank, SIZE, f"n{rank // 8:03d}"
    )
    flight.note("action", f"F{rank % STAGES}.0", "update", 117)
    return flight


def record(out: Path, rank: int, **more: Any) -> None:
    """Write the record of a rank, as `Flight.dump` does; by default it is at work."""
    lines = working(rank).text("SIGUSR1").splitlines()
    here = json.loads(lines[1])
    assert tuple(here) == RECORD_KEYS
    path = out / "flight" / f"rank-{rank:05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it may be a link
    path.write_text("\n".join([lines[0], json.dumps(here | more), *lines[2:]]))


def waits(what: str, *peers: int) -> dict[str, Any]:
    return {"wait_s": 600.0, "what": what, "peers": format_ranks(peers)}


def stage_of(rank: int) -> range:
    """Return the replicas of a rank's stage."""
    return range(rank % STAGES, SIZE, STAGES)


def stuck(out: Path, culprit: int) -> None:
    """Replicas x 16 stages: the culprit's stage waits in a mean, all others for a neighbour."""
    stage = culprit % STAGES
    for rank in range(SIZE):
        if rank == culprit:
            continue
        mine = rank % STAGES
        if mine == stage:
            record(
                out, rank, **waits("a mean of 37 tensors of replicas with tag 7", *stage_of(rank))
            )
        elif mine < stage:
            record(out, rank, **waits("a credit to send to rank 1 with tag 0", rank + 1))
        else:
            record(out, rank, **waits("(8, 16) float32 from rank 1 with tag 0", rank - 1))


@pytest.fixture(scope="module")
def hang(tmp_path_factory: pytest.TempPathFactory) -> Hang:
    """`stuck`, written once for each culprit; who wants the records again gets links to them."""
    made: dict[int, Path] = {}

    def links(out: Path, culprit: int) -> None:
        if culprit not in made:
            made[culprit] = tmp_path_factory.mktemp("stuck")
            stuck(made[culprit], culprit)
        shutil.copytree(made[culprit], out, copy_function=os.link, dirs_exist_ok=True)

    return links


def test_of_512_ranks_the_one_at_work_is_named(tmp_path: Path, hang: Hang) -> None:
    hang(tmp_path, 217)
    record(tmp_path, 217, idle_s=611.0, place="nets.py:14 in forward")
    lines = hang_report(tmp_path)
    assert "(SIGUSR1): 512 of 512 ranks answered" in lines[0]
    work = "at work    rank 217 on n027: F9.0 of update 117 for 611 s, at nets.py:14 in forward"
    assert lines[1] == work
    text = "\n".join(lines)
    assert "waiting    511 of 512 ranks" in text
    assert "(31 in all): a mean of 37 tensors of replicas with tag 7; awaits rank 217" in text
    assert "           rank 216: a credit to send to rank 1 with tag 0; awaits rank 217" in text
    assert "           rank 218: (8, 16) float32 from rank 1 with tag 0; awaits rank 217" in text
    assert "           478 for ranks that wait themselves" in text
    assert lines[-1].startswith("culprit    likely rank 217 on n027: 511 of the other 511 ranks")
    assert len(lines) < 10


def test_512_records_are_read_in_a_moment(tmp_path: Path, hang: Hang) -> None:
    hang(tmp_path, 217)
    began = time.perf_counter()
    hang_report(tmp_path)
    assert time.perf_counter() - began < 2.0


def silent(out: Path) -> str:
    """No record, and no host but the one that the attempt recorded."""
    run = {"kind": "run", "hosts": [f"h{rank}" for rank in range(SIZE)]}
    (out / "metrics.jsonl").write_text(json.dumps(run) + "\n")
    return "no answer  rank 300 on h300: gone, or not asked; it left no record"


def late(out: Path) -> str:
    """Only the record of an earlier question."""
    record(out, 300, unix_s=time.time() - 3600)
    return "no answer  rank 300 on n037: gone, or inside compiled code; its last record is of "


def before(out: Path) -> str:
    """Only the record of an earlier attempt."""
    (out / "flight-001").mkdir()
    (out / "flight-001" / "rank-00300.txt").touch()
    return "no answer  rank 300: gone, or not asked; its last record is of an earlier attempt ("


def damaged(out: Path) -> str:
    (out / "flight" / "rank-00300.txt").write_text("rank 300\n{\n")
    return "no answer  rank 300: gone"


def compiled(out: Path) -> str:
    """Stacks that were written from C, twice."""
    dump = (
        "Thread 0x1 (most recent call first):\n  File 'reader.py', line 2 in read\n"
        "Current thread 0x2 (most recent call first):\n  File 'nets.py', line {} in forward\n"
    )
    (out / "flight" / "rank-00300.stacks").write_text(dump.format(1) + dump.format(14))
    return "no answer  rank 300: inside compiled code, File 'nets.py', line 14 in forward ("


def failed(out: Path) -> str:
    record(out, 300, failed=True, why="ZeroDivisionError: none", place="nets.py:3 in forward")
    return (
        "failed     rank 300 on n037: ZeroDivisionError: none, in F12.0 of update 117, "
        "at nets.py:3 in forward"
    )


@pytest.mark.parametrize("trace", [silent, late, before, damaged, compiled, failed])
def test_a_rank_that_others_wait_for_leads(
    tmp_path: Path, hang: Hang, trace: Callable[[Path], str]
) -> None:
    """Rank 5 is at work, too, and nobody waits for it."""
    hang(tmp_path, 300)
    record(tmp_path, 5)
    expected = trace(tmp_path)
    lines = hang_report(tmp_path)
    assert lines[1].startswith(expected), lines[1]
    assert lines[2].startswith("at work    rank 5 on n000")
    assert "likely rank 300" in lines[-1]


def test_a_failure_leads_before_whoever_waits_for_nobody(tmp_path: Path, hang: Hang) -> None:
    hang(tmp_path, 217)
    record(tmp_path, 217)
    record(tmp_path, 5, failed=True, why="KeyError: 'a'")
    assert hang_report(tmp_path)[1].startswith("failed     rank 5 on n000: KeyError")


def test_a_circle_is_told(tmp_path: Path) -> None:
    for rank in range(SIZE):
        record(tmp_path, rank, **waits("(8, 16) float32", rank ^ 1))
    lines = hang_report(tmp_path)
    assert "circle     ranks 0-511 wait for each other" in lines[-1]
    assert not any("culprit" in line for line in lines)


def test_a_mean_that_all_have_joined_is_no_ranks_fault(tmp_path: Path) -> None:
    for rank in range(SIZE):
        record(tmp_path, rank, **waits("a mean", *range(SIZE)))
    assert "messages that the network does not bring" in hang_report(tmp_path)[-1]


def test_many_at_work_are_told_in_few_lines(tmp_path: Path) -> None:
    for rank in range(SIZE):
        record(tmp_path, rank)
    lines = hang_report(tmp_path)
    assert len(lines) < 12
    assert "and 504 more that wait for nobody" in lines[-1]


def test_a_folder_without_records_is_refused_with_how_to_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DtrainError, match="kill -USR1"):
        HangAnalysis(tmp_path)
    assert main(["flight", str(tmp_path)]) == 2
    assert "holds no record of a rank" in capsys.readouterr().err


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, 1, **waits("x", 0))
    flight = working(0)
    flight.folder = tmp_path / "flight"
    flight.dump("SIGUSR1")
    assert main(["flight", str(tmp_path)]) == 0
    assert "likely rank 0 on n000" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["", "3", "0-3", "0-3,8", "0,2,4-511"])
def test_spans_and_ranks_are_each_others_inverse(words: str) -> None:
    assert format_ranks(parse_ranks(words)) == words


def test_spans_of_many_are_few_words() -> None:
    assert format_ranks(range(SIZE)) == "0-511"
    assert format_ranks([8, 1, 0, 3, 2, 3]) == "0-3,8"
    assert os.linesep not in format_ranks(range(0, SIZE, 2))
