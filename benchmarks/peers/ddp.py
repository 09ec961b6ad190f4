"""Peer: torch DDP over gloo, an MLP 3072-1024x7-10, SGD with momentum 0.9.

Prints one JSON line: `step_s`, the least of `step_s_default`, `step_s_view`
(`gradient_as_bucket_view`) and `step_s_static` (that and `static_graph`), and `step_s_alone`,
without any exchange.

    torchrun --nproc-per-node 2 parallel.py ROWS STEPS
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
from peers.clock import timed

WIDTHS = (3072, *[1024] * 7)
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "view": {"gradient_as_bucket_view": True},
    "static": {"gradient_as_bucket_view": True, "static_graph": True},
}


def main() -> None:
    """Measure all kinds, and print on rank 0."""
    rows, steps = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x, y = torch.randn(rows, WIDTHS[0]), torch.randint(0, 10, (rows,))
    told = {
        f"step_s_{name}": timed(update(DistributedDataParallel(net(), **kind), x, y), steps)
        for name, kind in KINDS.items()
    }
    told["step_s"] = min(told.values())
    told["step_s_alone"] = timed(update(net(), x, y), steps)
    if dist.get_rank() == 0:
        print(json.dumps(told), flush=True)
    dist.destroy_process_group()


def net() -> nn.Module:
    """Return the MLP."""
    hidden = [each for pair in pairwise(WIDTHS) for each in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTHS[-1], 10))


def update(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Return one step of the model's training on always the same batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y))
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
