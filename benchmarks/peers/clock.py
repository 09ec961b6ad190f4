"""Time the steps of peers that run on ranks of torch.distributed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist


def seconds_per_step(step: Callable[[], None], steps: int, warmup: int = 3) -> float:
    """Return the seconds of one step between two barriers, after `warmup` steps."""
    for _ in range(warmup):
        step()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - start) / steps
