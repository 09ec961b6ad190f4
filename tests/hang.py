"""A run that hangs: the middle one of three stages stops in its third batch until it may go on."""

from __future__ import annotations

from pathlib import Path

HANGING = """
import pathlib
import time

from torch import nn


class Hanging(nn.Linear):
    def forward(self, input):
        self.seen = getattr(self, "seen", 0) + self.training
        if self.seen == 3:
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
    """Write the run file, which is returned, and the user's code beside it, with `more` of it.

    The rank that hangs touches `folder/hung` and goes on once there is `folder/go`.
    """
    code = (HANGING + more).replace("HUNG", f"{folder}/hung").replace("GO", f"{folder}/go")
    (folder / "user.py").write_text(code)
    (folder / "run.toml").write_text(RUN)
    return folder / "run.toml"
