"""A partition function of your own: it sees the layers and returns where blocks start.

dtrain run examples/own_partition.py --ranks 2
"""

import sys

import torch
from torch import nn

import dtrain

QUICK = "--quick" in sys.argv


def net():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 16, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def small_messages(layers, blocks):
    """Weigh the distance to equal shares of the work against the bytes that a cut sends."""
    total, largest = sum(layer.flops for layer in layers), max(layer.cut_bytes for layer in layers)
    done = [sum(layer.flops for layer in layers[:index]) / total for index in range(len(layers))]
    cuts = [0]
    for part in range(1, blocks):
        legal = [i for i in range(cuts[-1] + 1, len(layers) - blocks + part) if layers[i].can_cut]
        prices = {i: abs(done[i] - part / blocks) + layers[i].cut_bytes / largest for i in legal}
        cuts.append(min(prices, key=prices.get))
    return cuts[1:]


run = dtrain.Run(
    model=net,
    data=dtrain.data.digits(),
    partition=dtrain.Partition(blocks=3, cuts=small_messages),
    mesh=dtrain.Mesh(stages=2),
    objective="local-head",
    optimizer=dtrain.Optimizer("adam", lr=1e-3),
    epochs=1 if QUICK else 5,
    batch_size=64,
)

if __name__ == "__main__":
    if dtrain.init().rank == 0:
        print(dtrain.layers(net, example=torch.zeros(2, 1, 8, 8)))
        print(dtrain.plan(run, ranks=2))  # blocks, schedule, memory, messages; trains nothing
    result = dtrain.train(run)
    if result.rank == 0:
        print(f"test accuracy {result.test_accuracy:.3f}")
