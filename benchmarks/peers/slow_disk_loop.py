"""Peer: a plain PyTorch loop that reads each batch of `user.SlowDisk` before it computes.

Prints one JSON line: `update_s`, the median over all segments but the first.

    python slow_disk_loop.py SAMPLES WIDTH READ_MS BATCH STEPS SEGMENTS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from user import SlowDisk

from dtrain.data.sampler import epoch_order


def main() -> None:
    """Measure and print."""
    samples, width = map(int, sys.argv[1:3])
    batch, steps, segments = map(int, sys.argv[4:])
    torch.set_num_threads(1)
    dataset = SlowDisk(samples, width, float(sys.argv[3]))
    order = epoch_order(samples, 0, 0)
    net = nn.Sequential(nn.Linear(width, 1000), nn.ReLU(), nn.Linear(1000, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    seconds = []
    for segment in range(segments):
        start = time.perf_counter()
        for update in range(segment * steps, (segment + 1) * steps):
            rows = order[update * batch : (update + 1) * batch]
            optimizer.zero_grad()
            loss = cross_entropy(net(dataset.inputs(rows)), dataset.targets(rows))
            torch.autograd.backward(loss)
            optimizer.step()
        seconds.append((time.perf_counter() - start) / steps)
    print(json.dumps({"update_s": median(seconds[1:])}))


if __name__ == "__main__":
    main()
