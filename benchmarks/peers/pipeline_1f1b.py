"""Peer: torch.distributed.pipelining, 1F1B over gloo, eight layers of one width and a head.

Prints one JSON line: `step_s`, `samples_per_s` and `compute_s`, the update of the slowest stage
without communication (its micro-batches in sequence).

    torchrun --nproc-per-node 2 pipeline_1f1b.py MICROS STEPS [BATCH WIDTH LAYERS]
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

LR = 0.01


def main() -> None:
    """Measure, and print on rank 0."""
    micros, steps, *sizes = map(int, sys.argv[1:])
    batch, width, layers = [*sizes, *(256, 1024, 8)[len(sizes) :]]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    hidden = [
        layer for _ in range(layers // size) for layer in (nn.Linear(width, width), nn.ReLU())
    ]
    module = nn.Sequential(*hidden, *([nn.Linear(width, 10)] if rank == size - 1 else []))
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, micros, loss_fn=nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(module.parameters(), LR, fused=True)
    x, y = torch.randn(batch, width), torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        elif rank == size - 1:
            schedule.step(target=y)
        else:
            schedule.step()
        optimizer.step()

    def compute() -> None:
        optimizer.zero_grad()
        for rows in x.chunk(micros):
            module(rows.requires_grad_(rank > 0)).sum().backward()
        optimizer.step()

    step_s = seconds_per_step(step, steps)
    compute_s = torch.tensor(seconds_per_step(compute, steps))
    dist.all_reduce(compute_s, dist.ReduceOp.MAX)
    if rank == 0:
        figures = {
            "step_s": step_s,
            "samples_per_s": batch / step_s,
            "compute_s": float(compute_s),
        }
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
