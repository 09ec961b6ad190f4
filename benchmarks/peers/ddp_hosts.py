"""Peer: torch DDP over gloo on several hosts that Slurm starts, with the net of `parallel.py`.

Prints one JSON line: `step_s`, the least of the medians `step_s_KIND` over blocks of steps, and
`step_s_alone`, the same without any exchange. Kinds are those of `parallel.py`, and `whole`: its
`static` with all gradients in one bucket.

    srun -N 2 -n 4 python linked.py ROWS STEPS BLOCKS        with MASTER_ADDR, MASTER_PORT set
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
from peers.clock import timed
from peers.parallel import KINDS, WIDTHS, net, update

ALL: dict[str, dict[str, Any]] = KINDS | {"whole": KINDS["static"] | {"bucket_cap_mb": 1024}}


def main() -> None:
    """Measure all kinds, and print on rank 0."""
    rows, steps, blocks = map(int, sys.argv[1:])
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.manual_seed(0)
    x, y = torch.randn(rows, WIDTHS[0]), torch.randint(0, 10, (rows,))

    def typical(model: torch.nn.Module) -> float:
        step = update(model, x, y)
        return median(timed(step, steps, warm=0 if block else 4) for block in range(blocks))

    told = {
        f"step_s_{name}": typical(DistributedDataParallel(net(), **kind))
        for name, kind in ALL.items()
    }
    told["step_s"] = min(told.values())
    told["step_s_alone"] = typical(net())
    if rank == 0:
        print(json.dumps(told), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
