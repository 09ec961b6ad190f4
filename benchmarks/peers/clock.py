"""The clock of the peers that run on torch's own ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist


def timed(step: Callable[[], None], steps: int, warm: int = 3) -> float:
    """Return the seconds of one step, after `warm` to warm up, between two barriers."""
    for _ in range(warm):
        step()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - start) / steps
