"""Peer: torch.distributed.pipelining, 1F1B over gloo, with a sleep in place of the device.

Prints one JSON line: `efficiency` = `update_alone_s` (forward and backward of one stage's
micro-batches in sequence on one rank while the others wait) over `update_s`.

    torchrun --nproc-per-node 8 sleep_1f1b.py MICROS STEPS FORWARD_S BACKWARD_S
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peers.clock import seconds_per_step
from user import Sleeper

ROWS, WIDTH = 4, 16


def main() -> None:
    """Measure, and print on rank 0."""
    micros, steps = map(int, sys.argv[1:3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    module = Sleeper(WIDTH, *map(float, sys.argv[3:5]))
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, micros, loss_fn=nn.CrossEntropyLoss())
    x, y = torch.randn(micros * ROWS, WIDTH), torch.arange(micros * ROWS) % WIDTH

    def step() -> None:
        if rank == 0:
            schedule.step(x)
        elif rank == size - 1:
            schedule.step(target=y)
        else:
            schedule.step()

    def alone() -> None:
        if rank == 0:
            for rows in x.chunk(micros):
                module(rows).sum().backward()

    update_s = seconds_per_step(step, steps, warmup=1)
    alone_s = seconds_per_step(alone, steps, warmup=1)
    if rank == 0:
        figures = {
            "efficiency": alone_s / update_s,
            "update_s": update_s,
            "update_alone_s": alone_s,
        }
        print(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
