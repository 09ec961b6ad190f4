"""An objective of your own: a head per block and a loss, checked against the laws of training.

dtrain run examples/own_objective.py --ranks 2
"""

import math
import sys

from torch import nn
from torch.nn import functional

import dtrain

QUICK = "--quick" in sys.argv


class Margin(dtrain.objectives.AuxHead):
    """Every earlier block separates the classes linearly, by a margin."""

    margin: float = 1.0  # a field is a key: [objective] name = "own_objective:Margin", margin = 0.5

    def build_head(self, block):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(block.output_shape), block.classes, bias=False)
        )

    def loss(self, output, target):
        return functional.multi_margin_loss(output, target, margin=self.margin)


def net():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )


run = dtrain.Run(
    model=net,
    data=dtrain.data.digits(),
    partition=dtrain.Partition(cuts=["3", "5"]),
    mesh=dtrain.Mesh(stages=2),
    objective=Margin(margin=0.5),
    optimizer=dtrain.Optimizer("adam", lr=1e-3),
    epochs=2 if QUICK else 15,
    batch_size=64,
)

if __name__ == "__main__":
    if dtrain.init().size == 1:  # the check makes ranks of its own, as threads
        print(dtrain.testing.check_objective(Margin(margin=0.5)))
    result = dtrain.train(run)
    if result.rank == 0:
        print(f"test accuracy {result.test_accuracy:.3f}")
