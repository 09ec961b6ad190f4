"""User code that fails, for tests: each function is named by a run file."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dtrain
from dtrain.checkpoint import store

LIMIT_BYTES = 8192
"""More than a summary, less than a shard."""


class Raising(nn.Linear):
    """Raises in the forward of its third batch while training."""

    def forward(self, input: Tensor) -> Tensor:
        self.batches = getattr(self, "batches", 0) + self.training
        if self.batches == 3:
            raise ArithmeticError("the user's own mistake")
        return super().forward(input)


class Leaving(nn.Linear):
    """Leaves the program on one rank, in the forward of its third batch while training."""

    def forward(self, input: Tensor) -> Tensor:
        self.batches = getattr(self, "batches", 0) + self.training
        if self.batches == 3:
            sys.exit(0)
        return super().forward(input)


class Hanging(nn.Linear):
    """Hangs in training batch 40, or in the save after it, as `DTRAIN_TEST_HANG` says."""

    def forward(self, input: Tensor) -> Tensor:
        self.batches = getattr(self, "batches", 0) + self.training
        how = os.environ.get("DTRAIN_TEST_HANG") if self.batches == 40 else None
        if how == "sleep":
            time.sleep(1000)
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "save":
            store.save = lambda *_: time.sleep(1000)  # type: ignore[assignment]
        return super().forward(input)


class Slow(nn.Linear):
    """Takes 50 ms."""

    def forward(self, input: Tensor) -> Tensor:
        time.sleep(0.05)
        return super().forward(input)


class Filling(nn.Linear):
    """Makes the disk full once the first checkpoint is complete."""

    def forward(self, input: Tensor) -> Tensor:
        if list(Path(os.environ["DTRAIN_TEST_OUT"]).glob("checkpoints/update-*/manifest.json")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
        return super().forward(input)


def _net(last: type[nn.Linear]) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), last(16, 10))


def raising() -> nn.Sequential:
    return _net(Raising)


def leaving() -> nn.Sequential:
    return _net(Leaving)


def hanging() -> nn.Sequential:
    if os.environ.get("DTRAIN_TEST_HANG") == "start" and dtrain.init().rank:
        time.sleep(1000)
    return _net(Hanging)


def slow() -> nn.Sequential:
    return _net(Slow)


def filling() -> nn.Sequential:
    return _net(Filling)


def failing() -> nn.Sequential:
    raise KeyError("raised while the model is made")


def nothing() -> int:
    return 3


def shared() -> nn.Sequential:
    one = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), one, nn.ReLU(), one, nn.Linear(64, 10))


def narrow() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(8, 10))


def few_outputs() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


def bad_labels() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x = np.zeros((10, 3))
    return x, np.full(10, -1), x, np.zeros(10, dtype=np.int64)


def infinite() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.full((40, 3), torch.inf)
    return x, torch.zeros(40, dtype=torch.int64), x, torch.zeros(40, dtype=torch.int64)
