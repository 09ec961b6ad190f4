"""`tests.process.start` returns how a program ended and leaves no process behind."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.process import carriers, start

linux = pytest.mark.skipif(sys.platform != "linux", reason="finding processes needs Linux's /proc")


def test_output_and_code_are_returned() -> None:
    ended = start(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (ended.code, ended.out, ended.err, ended.late) == (3, "out\n", "err\n", False)
    assert ended.left == ()


def test_a_program_beyond_its_limit_is_killed() -> None:
    ended = start(["sh", "-c", "echo began; sleep 100"], limit_s=0.5)
    assert ended.late
    assert ended.code == -9
    assert ended.out == "began\n"


@linux
def test_a_process_that_left_its_group_is_named_and_killed() -> None:
    ended = start(["sh", "-c", "setsid sleep 99 >/dev/null 2>&1 & sleep 0.2"], grace_s=0.2)
    assert ended.left == ("sleep 99",)
    assert not ended.late


@linux
def test_sweep_kills_the_carriers_of_a_mark_only() -> None:
    marked = subprocess.Popen(["env", "DTRAIN_MARK=a", "sleep", "98"])
    other = subprocess.Popen(["env", "DTRAIN_MARK=ab", "sleep", "98"])
    try:
        while marked.pid not in carriers("DTRAIN_MARK=a") or not carriers("DTRAIN_MARK=ab"):
            time.sleep(0.01)
        # A zombie has no environment, so the sweep ends before this process has waited for it.
        assert start([sys.executable, "-m", "tests.process", "DTRAIN_MARK=a"]).code == 0
        assert marked.wait(timeout=10) == -9
        assert other.poll() is None
    finally:
        marked.kill()
        other.kill()
        other.wait()
