"""User code for tests: a mean of every block is in flight all the time, while one rank fails.

Invariant: nothing here waits for a mean before the next one starts, so there is one in flight
wherever a rank is, from the first update on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain.comm.allreduce import MeanReduction
from dtrain.syncs.base import UpdateClock
from dtrain.syncs.never import Never

WORDS = 1 << 20
FLYING: list[MeanReduction] = []


def _start(self: Never, clock: UpdateClock) -> None:
    """Land the mean of the update before; start the next."""
    for mean in FLYING:
        mean.wait()
    self.in_sync = False
    FLYING[:] = [self.replicas.imean_([torch.ones(WORDS)])]


def _land(self: Never) -> None:
    for mean in FLYING:
        mean.wait()
    FLYING.clear()


def _flies() -> None:
    Never.after_update = _start  # type: ignore[method-assign]
    Never.finish_pending = _land  # type: ignore[method-assign]


def _alone() -> bool:
    """Say whether this is the rank that fails."""
    return os.environ.get("OMPI_COMM_WORLD_RANK") == "1"


class Raising(nn.Linear):
    """Raises on rank 1 in its third batch, its mean not landed."""

    def forward(self, input: Tensor) -> Tensor:
        self.seen = getattr(self, "seen", 0) + self.training
        if self.seen == 3 and _alone():
            assert len(FLYING) == 1
            raise ArithmeticError("raised with a mean in flight")
        return super().forward(input)


class Napping(nn.Linear):
    """Rank 1 says in a file that it has a mean in flight, and computes no more."""

    def forward(self, input: Tensor) -> Tensor:
        self.seen = getattr(self, "seen", 0) + self.training
        if self.seen == 3 and _alone():
            assert len(FLYING) == 1
            Path(os.environ["DTRAIN_TEST_NAPS"]).touch()
            time.sleep(60)
        return super().forward(input)


def _net(last: type[nn.Linear]) -> nn.Sequential:
    _flies()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), last(16, 10))


def raising() -> nn.Sequential:
    return _net(Raising)


def napping() -> nn.Sequential:
    return _net(Napping)


def plain() -> nn.Sequential:
    return _net(nn.Linear)
