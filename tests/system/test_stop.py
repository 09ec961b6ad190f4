"""Signals to a run on two ranks, at every moment: it saves, leaves with 75, and goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from dtrain.config.parse import read_run
from dtrain.errors import SAVED_CODE
from tests.harness import train_in_threads
from tests.outcome import summary
from tests.process import Ended, start
from tests.system.programs import DTRAIN, RUN, write_run

LIMIT_S = 20.0
"""Seconds from a signal to the end of the job, on a busy machine."""

SCRIPT = """
import os, pathlib, signal, time
import dtrain

moment, rank, target, name = os.environ["STOP"].split(":")


def parent(process):
    return int(pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def stop(session, event):
    wanted = "update" if moment.isdigit() else moment
    if event.kind != wanted or session.rank != int(rank):
        return
    if moment.isdigit() and event.update != int(moment):
        return
    own = os.getpid()
    launcher = parent(parent(own))
    for process in {"rank": [own], "launcher": [launcher] * 2}[target]:
        pathlib.Path("signalled").write_text(str(time.time()))
        try:
            os.kill(process, getattr(signal, f"SIG{name}"))
        except ProcessLookupError:
            pass


dtrain.train(dtrain.Run.read("run.toml"), "out", callbacks=[stop])
os.kill(os.getpid(), signal.SIGUSR2)
"""
"""STOP says when, which rank signals, itself or the launcher (twice), and the signal. A warning of
the scheduler after the end changes nothing."""

STOPS = ("4:1:rank:TERM", "evaluation:1:rank:USR1", "16:0:launcher:TERM")
"""Inside the first epoch of 12 updates, in its evaluation, and inside the second epoch."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two epochs beside the script."""
    (tmp_path / "script.py").write_text(SCRIPT)
    return write_run(tmp_path, RUN.replace("epochs = 1", "epochs = 2"))


def start_script(folder: Path, stop: str) -> Ended:
    """Run the script on two ranks, which stops itself."""
    words = [*DTRAIN, "run", folder / "script.py", "--ranks", "2"]
    return start(words, cwd=folder, env=os.environ | {"STOP": stop}, limit_s=120)


def test_a_run_that_is_told_to_stop_saves_and_goes_on_bit_for_bit(run: Path) -> None:
    folder, updates = run.parent, list[int]()
    for stop in STOPS:
        ended = start_script(folder, stop)
        assert (ended.code, ended.late, ended.left) == (SAVED_CODE, False, ()), ended.err
        seconds = time.time() - float((folder / "signalled").read_text())
        assert seconds < LIMIT_S
        assert "Traceback" not in ended.err
        result = summary(folder / "out")
        assert result["status"] == "stopped"
        assert not (folder / "out" / "owner.json").exists()
        updates.append(result["updates"])
    assert 4 <= updates[0] <= 12 == updates[1] < 16 <= updates[2] < 24
    ended = start_script(folder, "never:0:rank:TERM")
    assert ended.code == 0, ended.err
    resumed = summary(folder / "out")
    whole = train_in_threads(read_run(run, []), folder / "whole")
    for key in ("digest", "test_loss", "train_loss", "samples", "bytes_intra_node", "status"):
        assert resumed[key] == whole[key], key
    assert resumed["attempts"] == len(STOPS) + 1


TWICE = """
import os, signal, time
import dtrain


def stop(session, event):
    if event.kind == "update" and event.update == 2:
        for _ in range(2):
            os.kill(os.getpid(), getattr(signal, os.environ["NAME"]))
            time.sleep(1.2)


dtrain.init()
if os.environ["NAME"] == "SIGUSR1":  # before training: it is remembered
    os.kill(os.getpid(), signal.SIGUSR1)
sets = ["mesh.stages=1", 'checkpoint.signals=["TERM", "USR1"]']
dtrain.train(dtrain.Run.read("run.toml", sets), "out", callbacks=[stop])
"""


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGINT", 130),
        ("SIGTERM", SAVED_CODE),
        ("SIGUSR1", SAVED_CODE),
        ("SIGUSR2", 128 + signal.SIGUSR2),
    ],
)
def test_a_second_ctrl_c_or_a_signal_left_out_ends_a_run_at_once(
    name: str, code: int, run: Path
) -> None:
    (run.parent / "script.py").write_text(TWICE)
    environ = os.environ | {"NAME": name}
    ended = start([sys.executable, "script.py"], cwd=run.parent, env=environ)
    assert (ended.code, ended.late) == (code, False), ended.err
    assert (summary(run.parent / "out")["updates"] > 0) == (name == "SIGTERM")
    assert summary(run.parent / "out")["status"] == "stopped"
    assert "Traceback" not in ended.err
