"""User code of the benchmarks' runs: generated data and sleeping layers.

Invariant: it lies beside the run file and imports nothing of the benchmarks; equal arguments give
equal arrays on every rank.
"""

from __future__ import annotations

import time
import zlib
from functools import partial
from typing import Any, final

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from dtrain.data.dataset import Dataset, DatasetSplits

Layers = list[tuple[str, Any]]


def noise(rows: int, width: int, classes: int = 10, tests: int = 64) -> tuple[Any, Any, Any, Any]:
    """Return normal inputs (rows, width) in float32 and cyclic labels, for training and test."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((count, width), dtype=np.float32) for count in (rows, tests)]
    y = [np.arange(count) % classes for count in (rows, tests)]
    return x[0], y[0], x[1], y[1]


def tokens(rows: int, steps: int, tokens: int, tests: int = 16) -> tuple[Any, Any, Any, Any]:
    """Return random tokens (rows, steps), and the next token of each step, for training and
    test."""
    rng = np.random.default_rng(0)
    parts = []
    for count in (rows, tests):
        text = rng.integers(0, tokens, (count, steps + 1), dtype=np.uint8)
        text[0, :2] = 0, tokens - 1
        parts += [text[:, :-1], text[:, 1:].astype(np.int64)]
    return parts[0], parts[1], parts[2], parts[3]


def subset(train: str, test: str, rows: int, tests: int) -> tuple[Any, Any, Any, Any]:
    """Return a random subset of two HDF5 files, bytes as bytes.

    The subset is random because a file imported from class folders is sorted by class.
    """
    parts = []
    for path, count in ((train, rows), (test, tests)):
        with h5py.File(path, "r") as file:
            x, y = file["x"][:], file["y"][:]
        indices = np.random.default_rng(0).permutation(len(y))[:count]
        parts += [x[indices], y[indices]]
    return parts[0], parts[1], parts[2], parts[3]


def deep(inputs: int, width: int, depth: int, classes: int) -> Layers:
    """Return a residual MLP with LayerNorm: a stem, one layer per unit, and a head."""
    units = [(f"unit{number}", lambda: Unit(width)) for number in range(depth)]
    return [
        ("stem", lambda: nn.Sequential(nn.Flatten(), nn.Linear(inputs, width))),
        *units,
        ("head", lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))),
    ]


class Unit(nn.Module):
    """A residual unit: LayerNorm, linear layer, ReLU."""

    uses_rng = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + relu(linear(norm(x)))``."""
        return x + torch.relu(self.linear(self.norm(x)))


def sleepers(layers: int, width: int, forward_s: float, backward_s: float) -> Layers:
    """Return linear layers (width to width) whose forward and backward sleep."""
    return [
        (f"layer{number}", lambda: Sleeper(width, forward_s, backward_s))
        for number in range(layers)
    ]


class Sleeper(nn.Module):
    """A small linear layer followed by a sleep in forward and backward."""

    uses_rng = False

    def __init__(self, width: int, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.times = forward_s, backward_s

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear layer, then sleep."""
        y: Tensor = Sleep.apply(self.linear(x), *self.times)  # type: ignore[no-untyped-call]
        return y


class Sleep(torch.autograd.Function):
    """The identity, with a sleep in forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        """Sleep, then copy."""
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Sleep, then return the gradient."""
        time.sleep(ctx.backward_s)
        return gradients[0].clone(), None, None


class SlowItems(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images (3, 32, 32) that cost about 2 ms each: a block of 1 MB is unpacked for every item.

    Parameters
    ----------
    size : int
        Number of items.
    """

    def __init__(self, size: int) -> None:
        self.targets = [index % 10 for index in range(size)]
        rng = np.random.default_rng(0)
        self._packed = zlib.compress(rng.integers(0, 24, 2**20, dtype=np.uint8).tobytes(), 1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        start = 997 * index % (2**20 - 3072)
        image = np.frombuffer(zlib.decompress(self._packed), np.uint8)[start : start + 3072]
        return torch.from_numpy(image.reshape(3, 32, 32).astype(np.float32)), index % 10


def slow_items(samples: int) -> tuple[SlowItems, SlowItems]:
    """Return a training split of so many items and a test split of 64."""
    return SlowItems(samples), SlowItems(64)


@final
class SlowDisk(Dataset):
    """Noise whose every read takes some milliseconds, as on a busy file system (a sleep).

    Parameters
    ----------
    size, width : int
        Samples, and features of each.
    read_ms : float
        Milliseconds of a read of any number of samples.
    """

    slow = True

    def __init__(self, size: int, width: int, read_ms: float) -> None:
        self.size, self.shape, self.classes = size, (width,), 10
        self._rows = torch.randn(256, width, generator=torch.Generator().manual_seed(0))
        self._read_s = read_ms / 1e3

    def inputs(self, indices: Any) -> Tensor:
        time.sleep(self._read_s)
        return self._rows[np.asarray(indices) % 256]

    def targets(self, indices: Any) -> Tensor:
        return torch.from_numpy(np.asarray(indices) % 10)


def slow_disk(samples: int, width: int, read_ms: float) -> DatasetSplits:
    """Return a training split on a slow disk, and a test split of 64 samples."""
    return DatasetSplits(SlowDisk(samples, width, read_ms), SlowDisk(64, width, 0.0))


def late_stages(width: int, seconds: float, late: int, late_s: float, every: int) -> Layers:
    """Return four layers, each of which sleeps in a forward of training and notes the time.

    Layer `late` sleeps `late_s` more in every `every`-th forward.
    """
    outputs = [width, width, width, 10]
    return [
        (
            f"stage{number}",
            partial(Noted, width, size, number, seconds, late_s if number == late else 0.0, every),
        )
        for number, size in enumerate(outputs)
    ]


@final
class Noted(nn.Linear):
    """A linear layer that sleeps, and appends the time of each forward of training to a file."""

    uses_rng = False

    def __init__(
        self, inputs: int, outputs: int, number: int, seconds: float, late_s: float, every: int
    ) -> None:
        super().__init__(inputs, outputs)
        self._number = number
        self._seconds = seconds
        self._late_s = late_s
        self._every = every
        self._forwards = 0

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b."""
        if self.training and input.device.type == "cpu" and not is_fake(input):
            self._forwards += 1
            late_s = 0.0 if self._forwards % self._every else self._late_s
            time.sleep(self._seconds + late_s)
            with open(f"times-{self._number}.txt", "a", encoding="utf-8") as file:
                file.write(f"{time.time()}\n")
        return super().forward(input)


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no memory: it plans the run."""
    return type(tensor).__name__ == "FakeTensor"
