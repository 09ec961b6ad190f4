"""Peer: torch DDP over gloo on several hosts that Slurm starts, with the MLP of `ddp.py`.

Prints one JSON line: `step_s`, the smallest of the medians `step_s_SETTING` over measurements of
STEPS steps, and `step_s_alone`, the same without communication. The settings are those of `ddp.py`
and `whole`: its `static` with all gradients in one bucket.

    srun -N 2 -n 4 python ddp_hosts.py ROWS STEPS REPETITIONS   with MASTER_ADDR, MASTER_PORT set
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peers.clock import seconds_per_step
from peers.ddp import DDP_SETTINGS, WIDTHS, make_mlp, make_step

SETTINGS: dict[str, dict[str, Any]] = DDP_SETTINGS | {
    "whole": DDP_SETTINGS["static"] | {"bucket_cap_mb": 1024}
}


def main() -> None:
    """Measure all settings, and print on rank 0."""
    rows, steps, repetitions = map(int, sys.argv[1:])
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.manual_seed(0)
    x, y = torch.randn(rows, WIDTHS[0]), torch.randint(0, 10, (rows,))

    def median_seconds(model: torch.nn.Module) -> float:
        step = make_step(model, x, y)
        return median(
            seconds_per_step(step, steps, warmup=0 if number else 4)
            for number in range(repetitions)
        )

    figures = {
        f"step_s_{name}": median_seconds(DistributedDataParallel(make_mlp(), **settings))
        for name, settings in SETTINGS.items()
    }
    figures["step_s"] = min(figures.values())
    figures["step_s_alone"] = median_seconds(make_mlp())
    if rank == 0:
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
