"""Run files, user code and commands for the tests of whole programs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from dtrain.cli import main
from tests.conftest import ROOT
from tests.process import Ended, carriers, start

USER = ROOT / "tests" / "system" / "user"
DTRAIN = [sys.executable, "-m", "dtrain"]

RUN = """
epochs = 1
batch-size = 128
micro-batches = 3
threads = 1
[data]
name = "blobs:blobs"
[model]
name = "mlp"
widths = [61, 47, 53]
[mesh]
stages = 2
[partition]
blocks = 3
[optimizer]
name = "adam"
lr = 1e-3
"""
"""Twelve updates on two stages."""


def write_run(folder: Path, text: str = RUN, *modules: str) -> Path:
    """Write a run file, the data `blobs` and modules of `tests/system/user` into a folder.

    Returns the path of the run file.
    """
    for module in ("blobs", *modules):
        (folder / f"{module}.py").write_text((USER / f"{module}.py").read_text())
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def train_command(run: Path, out: Path, ranks: int, *sets: str) -> list[str]:
    """Return the command that trains on ranks of this host; `sets` are KEY=VALUE."""
    words = [*DTRAIN, "train", str(run), "--out", str(out), "--ranks", str(ranks)]
    return [*words, *(word for change in sets for word in ("--set", change))]


def train(
    run: Path,
    out: Path,
    ranks: int,
    *sets: str,
    limit_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """Train on ranks of this host; assert that it went well and left nothing behind."""
    environ = os.environ | dict(env or {})
    ended = start(train_command(run, out, ranks, *sets), limit_s=limit_s, env=environ, cwd=ROOT)
    assert (ended.code, ended.late, ended.left) == (0, False, ()), ended.err
    return ended


def assert_one_error(ended: Ended, code: int) -> None:
    """Assert that one rank printed one error, without a traceback, and that nothing is left."""
    text = f"{ended.out}\n{ended.err}"
    assert (ended.late, ended.code, ended.left) == (False, code, ()), text
    assert "Traceback" not in text
    assert text.count("dtrain: ") == 1, text


def wait_until_gone(mark: str, limit_s: float) -> None:
    """Assert that every process with a mark ends within a limit."""
    deadline = time.monotonic() + limit_s
    while carriers(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert carriers(mark) == []


def run_in_process(*words: str | Path) -> int:
    """Run a dtrain command in this process, as a single rank, and return its exit code.

    Signal handlers are what they were afterwards.
    """
    names = ("INT", "TERM", "USR1", "USR2", "URG", "CONT")
    numbers = [signal.Signals[f"SIG{name}"] for name in names]
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
