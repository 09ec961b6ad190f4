"""Data sets that worker processes import."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch.utils.data import Dataset

from dtrain.errors import DataError


class Pairs(Dataset[Any]):
    """30 items of two inputs; some indices fail."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == 20:
            raise KeyError("my own")
        if index == 21:
            raise DataError("data.mine", "my own")
        if index == 22:
            raise Unpicklable
        if index == 23:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.full((2, 3), float(index + self.offset))
        return (x, torch.tensor([index], dtype=torch.int16)), index % 3


class Unpicklable(Exception):
    """An exception that cannot be sent."""

    def __reduce__(self) -> Any:
        raise TypeError


class Surroundings(Dataset[Any]):
    """Items that tell about the process that reads them."""

    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "PMIX_RANK")

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Any, int]:
        facts = [
            os.getpid(),
            torch.get_num_threads(),
            sum(name in os.environ for name in self.names),
            sum(
                signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            ),
            len(os.listdir("/proc/self/fd")),
        ]
        return torch.tensor([facts], dtype=torch.float64), index % 2


def add_noise(
    sample: torch.Tensor, index: int, epoch: int, generator: torch.Generator
) -> torch.Tensor:
    """Change a sample, as a user does."""
    return sample + index + 100 * epoch + torch.rand(sample.shape, generator=generator)
