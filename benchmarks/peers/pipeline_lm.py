"""Peer: torch.distributed.pipelining, 1F1B over gloo, on the stages of dtrain's transformer.

Prints one JSON line: `step_s`, `tokens_per_s` and `compute_s`, the update of the slowest stage
without communication (its micro-batches in sequence).

    torchrun --nproc-per-node 2 pipeline_lm.py MICROS STEPS BATCH LENGTH TOKENS WIDTH DEPTH HEADS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peers.clock import seconds_per_step

from dtrain.models.output_spec import OutputSpec
from dtrain.models.transformer import Transformer

LR = 1e-3


def main() -> None:
    """Measure, and print on rank 0."""
    micros, steps, batch, length, vocabulary, width, depth, heads = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    module = make_stage(rank, size, (length, vocabulary), (width, depth, heads))
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, micros, loss_fn=loss)
    optimizer = torch.optim.Adam(module.parameters(), LR, fused=True)
    x, y = (torch.randint(0, vocabulary, (batch, length)) for _ in range(2))

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        elif rank == size - 1:
            schedule.step(target=y)
        else:
            schedule.step()
        optimizer.step()

    hidden = torch.randn(batch, length, width)

    def compute() -> None:
        optimizer.zero_grad()
        for rows in (x if rank == 0 else hidden).chunk(micros):
            given = rows if rank == 0 else rows.clone().requires_grad_()
            module(given).sum().backward()
        optimizer.step()

    step_s = seconds_per_step(step, steps)
    compute_s = torch.tensor(seconds_per_step(compute, steps))
    dist.all_reduce(compute_s, dist.ReduceOp.MAX)
    if rank == 0:
        figures = {
            "step_s": step_s,
            "tokens_per_s": batch * length / step_s,
            "compute_s": float(compute_s),
        }
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


def make_stage(
    rank: int, size: int, data: tuple[int, int], sizes: tuple[int, int, int]
) -> nn.Module:
    """Return the layers of a stage: as many transformer layers on each, the classes last."""
    (length, vocabulary), (width, depth, heads) = data, sizes
    model = Transformer(depth=depth, width=width, heads=heads)
    output = OutputSpec((length, vocabulary), class_axis=-1)
    factories = model.layers((length,), output)
    assert not isinstance(factories, nn.Module)
    share = depth // size
    first, last = 1 + rank * share, 1 + (rank + 1) * share
    first, last = (0 if rank == 0 else first), (depth + 2 if rank == size - 1 else last)
    return nn.Sequential(*(make() for _, make in factories[first:last]))


def loss(scores: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of scores (rows, steps, classes)."""
    return cross_entropy(scores.flatten(0, 1), target.flatten())


if __name__ == "__main__":
    main()
