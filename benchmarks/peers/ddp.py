"""Peer: torch DDP over gloo, an MLP 3072-1024x7-10, SGD with momentum 0.9.

Prints one JSON line: `step_s`, the smallest of `step_s_default`, `step_s_view`
(`gradient_as_bucket_view`) and `step_s_static` (that and `static_graph`), and `step_s_alone`,
without communication.

    torchrun --nproc-per-node 2 ddp.py ROWS STEPS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peers.clock import seconds_per_step

WIDTHS = (3072, *[1024] * 7)
DDP_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "view": {"gradient_as_bucket_view": True},
    "static": {"gradient_as_bucket_view": True, "static_graph": True},
}


def main() -> None:
    """Measure all settings, and print on rank 0."""
    rows, steps = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x, y = torch.randn(rows, WIDTHS[0]), torch.randint(0, 10, (rows,))

    def seconds(model: nn.Module) -> float:
        return seconds_per_step(make_step(model, x, y), steps)

    figures = {
        f"step_s_{name}": seconds(DistributedDataParallel(make_mlp(), **settings))
        for name, settings in DDP_SETTINGS.items()
    }
    figures["step_s"] = min(figures.values())
    figures["step_s_alone"] = seconds(make_mlp())
    if dist.get_rank() == 0:
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


def make_mlp() -> nn.Module:
    """Return the MLP."""
    hidden = [layer for pair in pairwise(WIDTHS) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTHS[-1], 10))


def make_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Return a function that trains the model for one step, always on the same batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y))
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
