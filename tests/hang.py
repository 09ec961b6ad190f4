"""A run that hangs: the middle one of three stages stops in its third batch until a file exists."""

from __future__ import annotations

from pathlib import Path

HANGING = """
import pathlib
import time

from torch import nn


class Hanging(nn.Linear):
    def forward(self, input):
        self.batches = getattr(self, "batches", 0) + self.training
        if self.batches == 3:
            pathlib.Path("HUNG").touch()
            while not pathlib.Path("GO").exists():
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
name = "digits"
[model]
name = "user:hanging"
[mesh]
stages = 3
[partition]
cuts = [2, 4]
[optimizer]
name = "adam"
"""


def place(folder: Path, more: str = "") -> Path:
    """Write the user's code, with `more` appended, and the run file beside it; return the latter.

    The rank that hangs touches `folder/hung` and continues once `folder/go` exists.
    """
    code = (HANGING + more).replace("HUNG", f"{folder}/hung").replace("GO", f"{folder}/go")
    (folder / "user.py").write_text(code)
    (folder / "run.toml").write_text(RUN)
    return folder / "run.toml"
