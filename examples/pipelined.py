"""Pipelined backpropagation with weight prediction, beside 1f1b.

dtrain run examples/pipelined.py --ranks 2

1f1b computes with the weights of one update and leaves stages idle at its ends. `pipelined` never
waits: gradients are late by the blocks behind, and the prediction makes up for it.
"""

import sys

from torch import nn

import dtrain

QUICK = "--quick" in sys.argv


def net():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        *(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


base = dtrain.Run(
    model=net,
    data=dtrain.data.digits(),
    mesh=dtrain.Mesh(stages=2),
    partition=dtrain.Partition(cuts=[3, 5]),
    objective="backprop",
    schedule="1f1b",
    micro_batches=4,
    optimizer=dtrain.Optimizer("sgd", lr=0.02, momentum=0.9),
    epochs=2 if QUICK else 10,
    batch_size=32,
)
late = base.replace(schedule="pipelined", micro_batches=1)  # an update after every micro-batch
predicted = base.replace(
    schedule=dtrain.schedules.Pipelined(prediction="velocity"), micro_batches=1
)
runs = {"1f1b": base, "pipelined": late, "pipelined-predicted": predicted}

if __name__ == "__main__":
    rows = []
    for name, run in runs.items():
        result = dtrain.train(run, out=f"runs/pipelined/{name}")
        accuracy, loss = result.test_accuracy, result.history[-1]["train_loss"]
        rows.append(f"{name:20} accuracy {accuracy:.3f}, training loss {loss:.3f}")
    if result.rank == 0:
        print("\n".join(rows))
