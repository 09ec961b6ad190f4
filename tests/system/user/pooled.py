"""User code that computes in pools of processes, in its data function and while it trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys

import numpy as np
from blobs import blobs as load_blobs
from torch import Tensor, nn


def scaled(factor: float) -> float:
    return 2 * factor


def compute() -> list[float]:
    """Return numbers of a pool, which ends its processes by SIGTERM."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(scaled, [0.5, 1.0])


def blobs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return samples that processes of a pool have changed."""
    x, y, x_test, y_test = load_blobs()
    return x * compute()[0], y, x_test, y_test


class Pooled(nn.Linear):
    """Uses a pool and a forked process in its third batch while training."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[1] == 64 and len(input) > 2:
            self.batches = getattr(self, "batches", 0) + 1
            if self.batches == 3:
                compute()
                self.fork()
        return super().forward(input)

    def fork(self) -> None:
        """Fork a process that gets the signals for records and checkpoints, and raises."""
        child = os.fork()
        if child == 0:
            for number in (signal.SIGURG, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(os.getpid(), number)
            try:
                sys.excepthook(KeyError, KeyError("of a forked process"), None)
            finally:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def net() -> nn.Sequential:
    """Return a net for two stages, the first of which uses pools while it trains."""
    return nn.Sequential(nn.Flatten(), Pooled(64, 24), nn.ReLU(), Pooled(24, 10))
