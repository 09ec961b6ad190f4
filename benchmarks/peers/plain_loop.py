"""Peer: a plain PyTorch loop over the CIFAR-10 MLP in one process, on dtrain's dataset.

Prints one JSON line: `update_s`, the median over all segments but the first.

    python plain_loop.py TRAIN.h5 TEST.h5 BATCH STEPS SEGMENTS
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dtrain.data import load_data
from dtrain.data.sampler import epoch_order

WIDTHS = (3072, 1000, 1000, 1000)


def main() -> None:
    """Measure and print."""
    train, test = sys.argv[1:3]
    batch, steps, segments = map(int, sys.argv[3:])
    torch.set_num_threads(1)
    dataset = load_data("hdf5", {"train": train, "test": test}, Path()).train
    order = epoch_order(dataset.size, 0, 0, "full")
    hidden = [layer for pair in pairwise(WIDTHS) for layer in (nn.Linear(*pair), nn.ReLU())]
    net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTHS[-1], 10))
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
