"""A run that hangs: the middle one of three stages stops in three of its batches, one by one.

Phases, by the name of the file that exists while the rank hangs; `release` ends a phase.

`stuck`
    A loop in compiled code, as in a kernel or a dead file system: no signal handler of Python runs.
`sleeps`
    A loop in Python.
`last`
    The same, once the run has gone on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

PHASES = ("stuck", "sleeps", "last")

HANGING = """
import collections
import functools
import os
import pathlib
import time

from torch import nn

FOLDER = pathlib.Path(__file__).parent
PHASES = dict(zip((3, 5, 7), PHASE_NAMES))


class Hanging(nn.Linear):
    def forward(self, input):
        self.batches = getattr(self, "batches", 0) + self.training
        phase = PHASES.get(self.batches)
        if phase and self.training:
            (FOLDER / phase).touch()
            released = functools.partial(os.access, f"{FOLDER}/{phase}.go", os.F_OK)
            if phase == "stuck":
                collections.deque(iter(released, True), maxlen=0)
            while not released():
                time.sleep(0.05)
        return super().forward(input)


def hanging():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), Hanging(16, 16), nn.Linear(16, 10)
    )
"""

RUN = """
epochs = 1
batch-size = 50
threads = 1
[data]
name = "blobs:blobs"
[model]
name = "user:hanging"
[mesh]
stages = 3
[partition]
cuts = [2, 4]
[optimizer]
name = "adam"
"""


def write_hanging_run(folder: Path, phases: Iterable[str] = PHASES) -> Path:
    """Write the user's code, its data and the run file into a folder; return the run file.

    Only the given phases occur.
    """
    names = repr([phase if phase in phases else None for phase in PHASES])
    (folder / "user.py").write_text(HANGING.replace("PHASE_NAMES", names))
    blobs = Path(__file__).parent / "system" / "user" / "blobs.py"
    (folder / "blobs.py").write_text(blobs.read_text())
    (folder / "run.toml").write_text(RUN)
    return folder / "run.toml"


def release(folder: Path, phase: str) -> None:
    """Let the rank that hangs in a phase continue."""
    (folder / f"{phase}.go").touch()


def wait_for(*paths: Path, limit_s: float = 60.0) -> None:
    """Wait until all files exist."""
    deadline = time.monotonic() + limit_s
    while missing := [path.name for path in paths if not path.exists()]:
        assert time.monotonic() < deadline, f"missing after {limit_s} s: {missing}"
        time.sleep(0.02)
