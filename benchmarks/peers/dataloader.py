"""Peer: a plain PyTorch loop over `user.SlowItems` with torch's DataLoader and two processes.

Prints one JSON line: `samples_per_s`, the median over all segments but the first.

    python dataloader.py SAMPLES BATCH STEPS SEGMENTS WORKERS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from user import SlowItems


def main() -> None:
    """Measure and print."""
    samples, batch, steps, segments, workers = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    loader = DataLoader(
        SlowItems(samples), batch, shuffle=True, num_workers=workers, persistent_workers=True
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    batches, seconds = _endless(loader), []
    for _ in range(segments):
        start = time.perf_counter()
        for _ in range(steps):
            x, y = next(batches)
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(net(x), y))
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"samples_per_s": batch * steps / median(seconds[1:])}))


def _endless(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


if __name__ == "__main__":
    main()
