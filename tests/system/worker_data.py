"""Data sets that worker processes import."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
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


class Columns(Dataset[Any]):
    """Items whose label is a row of one real number; those of one process are read once."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        assert index not in self.reads[1:]  # the first item is read at the start
        self.reads.append(index)
        return torch.full((2,), float(index)), torch.tensor([index % 3.0])


class Images(Dataset[Any]):
    """Items that a numpy array and a tensor of 32 MB each hold; each item says how much memory
    its process has for itself."""

    def __init__(self) -> None:
        self.array = np.ones((8, 2**19), np.float64)
        self.tensor = torch.ones(8, 2**19, dtype=torch.float64)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        total = self.array.sum() + self.tensor.sum().item()
        self.array[index, 0] = self.tensor[index, 0] = 1  # it may be written to
        return torch.tensor([total, float(own_bytes())], dtype=torch.float64), index % 2


def own_bytes() -> int:
    """Return the bytes of this process that are in no file and in no shared memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


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
