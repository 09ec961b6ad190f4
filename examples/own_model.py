"""A model of your own with skip connections, cut where you say.

dtrain run examples/own_model.py --ranks 2
"""

import sys

import torch
from torch import nn

import dtrain

QUICK = "--quick" in sys.argv


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.relu(self.linear(self.norm(x)))


class Net(nn.Module):
    def __init__(self, width=96, depth=4):
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.body = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(torch.relu(self.stem(x.flatten(1)))))


run = dtrain.Run(
    model=Net,
    data=dtrain.data.digits(),
    partition=dtrain.Partition(cuts=["body.1", "body.3"]),  # three blocks, whatever the ranks
    mesh=dtrain.Mesh(stages=2),  # one rank holds all; 4 ranks are 2 stages x 2 replicas
    objective="mono-forward",  # each block has a loss of its own
    optimizer=dtrain.Optimizer("adamw", lr=2e-3, weight_decay=0.01),
    epochs=2 if QUICK else 20,
    batch_size=64,
)

if __name__ == "__main__":
    result = dtrain.train(run)  # into runs/own_model; started again, it resumes from there
    if result.rank == 0:
        net = Net()
        net.load_state_dict(result.state_dict())  # plain PyTorch from here on
        print(f"test accuracy {result.test_accuracy:.3f}, blocks {result.history[-1]}")
