"""Fine-tuning: another run's weights, a new head, and a first block that stays as it is.

dtrain run examples/fine_tuning.py --ranks 2
"""

import sys
from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import nn

import dtrain

QUICK = "--quick" in sys.argv
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
y = torch.tensor(digits.target)


def splits(low, high):
    """Return the digits low .. high - 1, as classes from 0."""
    rows = torch.nonzero((y >= low) & (y < high)).flatten()
    train, test = rows[: -len(rows) // 5], rows[-len(rows) // 5 :]
    return x[train], y[train] - low, x[test], y[test] - low


def net(classes):
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU())
    layers = {"trunk": trunk, "neck": nn.Sequential(nn.Linear(128, 64), nn.ReLU())}
    layers[f"head{classes}"] = nn.Linear(64, classes)  # a new name: a new head starts anew
    return nn.Sequential(OrderedDict(layers))


first = dtrain.Run(
    model=net,
    data={"name": splits, "low": 0, "high": 6},
    partition=dtrain.Partition(cuts=["neck"]),
    mesh=dtrain.Mesh(stages=2),
    optimizer=dtrain.Optimizer("adam", lr=1e-3),
    epochs=2 if QUICK else 10,
    batch_size=64,
)

if __name__ == "__main__":
    source = dtrain.train(first, out="runs/fine_tuning/six-digits")
    tuned = first.replace(
        data={"name": splits, "low": 6, "high": 10},
        # strict=False: the file may hold some of the tensors; the new head is not among them
        model={"name": net, "weights": str(source.out.resolve()), "strict": False},
        partition=dtrain.Partition(cuts=["neck"], frozen=[0]),
        epochs=1 if QUICK else 5,
    )
    result = dtrain.train(tuned, out="runs/fine_tuning/four-digits")
    if result.rank == 0:
        before, after = source.state_dict(), result.state_dict()
        print(f"test accuracy {source.test_accuracy:.3f}, fine-tuned {result.test_accuracy:.3f}")
        print(
            "first layer unchanged:", torch.equal(before["trunk.1.weight"], after["trunk.1.weight"])
        )
