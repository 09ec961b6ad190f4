"""Means in flight when a rank fails, a job is stopped, or a group is closed: no hang, no leak."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from dtrain.comm.allreduce import PIECE_BYTES
from dtrain.comm.backends import threads
from dtrain.comm.communicator import Comm
from tests import outcome
from tests.conftest import ROOT
from tests.process import carriers, start, sweep

RUN = """
epochs = 2
batch-size = 100
threads = 1
[data]
name = "digits"
[model]
name = "inflight:plain"
[mesh]
stages = 1
[partition]
blocks = 1
[sync]
name = "never"
[optimizer]
name = "adam"
"""
WORDS = 3 * PIECE_BYTES // 4
"""Of three pieces."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run file beside user code that has a mean in flight all the time."""
    source = ROOT / "tests" / "system" / "user" / "inflight.py"
    (tmp_path / "inflight.py").write_text(source.read_text())
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def command(run: Path, net: str, debug: bool) -> list[str]:
    words = [sys.executable, "-m", "dtrain", "train", str(run), "--ranks", "2"]
    words += ["--out", str(run.parent / "out"), "--set", f"model.name=inflight:{net}"]
    return [*words, "--set", f"debug={str(debug).lower()}"]


@pytest.mark.parametrize("debug", [False, True])
def test_a_rank_that_raises_speaks_and_nothing_is_left(run: Path, debug: bool) -> None:
    ended = start(command(run, "raising", debug), limit_s=60, cwd=ROOT)
    assert not ended.late
    assert (ended.code, ended.left) == (1, ()), ended.err
    assert ended.err.count("Traceback (most recent call last)") == 1
    assert "ArithmeticError: raised with a mean in flight" in ended.err
    assert "[replica 1 stage 0 | update 2 | action F0.0]" in ended.err
    assert outcome.summary(run.parent / "out")["status"] == "failed"


def test_a_run_that_always_has_one_ends_and_goes_on(run: Path) -> None:
    """Checkpoints, evaluation and the end come with nothing in flight: `settle` has landed it."""
    ended = start(command(run, "plain", False), limit_s=60, cwd=ROOT)
    assert (ended.code, ended.left) == (0, ()), ended.err
    again = start([*command(run, "plain", True), "--set", "epochs=3"], limit_s=60, cwd=ROOT)
    assert (again.code, again.left) == (0, ()), again.err
    assert outcome.summary(run.parent / "out")["updates"] == 3 * 15


def test_a_stopped_run_leaves_nothing(run: Path) -> None:
    mark, naps = f"DTRAIN_MARK={os.getpid()}inflight", run.parent / "naps"
    environ = os.environ | dict([mark.split("=")]) | {"DTRAIN_TEST_NAPS": str(naps)}
    words = command(run, "napping", False)
    child = subprocess.Popen(words, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not naps.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert naps.exists()
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=15)
        assert child.returncode == 128 + signal.SIGTERM
        assert outcome.summary(run.parent / "out")["status"] == "stopped"
        record = (run.parent / "out" / "flight" / "rank-00001.txt").read_text()
        assert "a mean of 1 tensors of replicas" in record.partition("last events")[0]
        deadline = time.monotonic() + 5
        while carriers(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert carriers(mark) == []
        assert not (run.parent / "out" / "owner.json").exists()
    finally:
        sweep(mark)
        child.wait()


def lent(comm: Comm) -> int:
    """Return how many buffers of the family's scratch memory nobody holds."""
    return sum(map(len, comm.context.buffer_pool._free.values()))


def test_scratch_is_given_back_when_a_mean_lands() -> None:
    def work(comm: Comm) -> tuple[int, int]:
        comm.imean_([torch.ones(WORDS)]).wait()
        before = lent(comm)
        handles = [comm.imean_([torch.ones(WORDS)]) for _ in range(3)]
        for handle in handles:
            handle.wait()
        comm.allgather_object(None)
        return before, lent(comm)

    for before, after in threads.run_ranks(3, work, hosts=["a", "b", "b"]):
        assert 0 < before <= after <= 3 * before


def test_a_rank_that_raises_ends_all_and_the_tensors_go() -> None:
    """What a rank was about to average, and the memory lent for that, are let go by the error."""
    watched: list[weakref.ref[torch.Tensor]] = []

    def work(comm: Comm) -> None:
        tensor = torch.ones(WORDS)
        watched.append(weakref.ref(tensor))
        handle = comm.imean_([tensor])
        comm.allgather_object(None)
        if comm.rank == 1:
            raise ZeroDivisionError("of rank 1")
        handle.wait()
        comm.allgather_object(None)

    with pytest.raises(ZeroDivisionError, match="of rank 1") as caught:
        threads.run_ranks(3, work)
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    assert [each() for each in watched] == [None] * 3


def test_a_closed_group_names_its_mean_which_can_still_land() -> None:
    def work(comm: Comm) -> float:
        group = comm.dup("errands")
        tensor = torch.full((WORDS,), float(comm.rank))
        if comm.rank == 0:
            handle = group.imean_([tensor])
            with pytest.raises(
                RuntimeError, match=r"errands is closed with 1 in flight: a mean of"
            ):
                group.close()
        comm.allgather_object(None)
        if comm.rank:
            handle = group.imean_([tensor])
        handle.wait()
        group.close()
        comm.allgather_object(None)
        return float(tensor.max())

    assert threads.run_ranks(2, work) == [0.5, 0.5]
