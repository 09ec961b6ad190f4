"""User code for tests: a mean of every block is always in flight; one rank fails or sleeps.

Invariant: a mean is completed only before the next one starts, so one is in flight wherever a rank
is, from the first update on.
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
IN_FLIGHT: list[MeanReduction] = []


def start_mean(self: Never, clock: UpdateClock) -> None:
    """Complete the mean of the previous update; start the next."""
    complete_means(self)
    self.in_sync = False
    IN_FLIGHT[:] = [self.replicas.imean_([torch.ones(WORDS)])]


def complete_means(self: Never) -> None:
    """Complete the mean that is in flight."""
    for mean in IN_FLIGHT:
        mean.wait()
    IN_FLIGHT.clear()


def _is_faulty_rank() -> bool:
    return os.environ.get("OMPI_COMM_WORLD_RANK") == "1"


class Raising(nn.Linear):
    """Raises on rank 1 in its third batch, with a mean in flight."""

    def forward(self, input: Tensor) -> Tensor:
        self.batches = getattr(self, "batches", 0) + self.training
        if self.batches == 3 and _is_faulty_rank():
            assert len(IN_FLIGHT) == 1
            raise ArithmeticError("raised with a mean in flight")
        return super().forward(input)


class Sleeping(nn.Linear):
    """Creates a file on rank 1 once a mean is in flight, then sleeps."""

    def forward(self, input: Tensor) -> Tensor:
        self.batches = getattr(self, "batches", 0) + self.training
        if self.batches == 3 and _is_faulty_rank():
            assert len(IN_FLIGHT) == 1
            Path(os.environ["DTRAIN_TEST_SLEEPS"]).touch()
            time.sleep(60)
        return super().forward(input)


def _net(last: type[nn.Linear]) -> nn.Sequential:
    Never.after_update = start_mean  # type: ignore[method-assign]
    Never.finish_pending = complete_means  # type: ignore[method-assign]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), last(16, 10))


def raising() -> nn.Sequential:
    return _net(Raising)


def sleeping() -> nn.Sequential:
    return _net(Sleeping)
