"""A sync of your own: replicas average their weights ever less often.

dtrain run examples/own_sync.py --ranks 4
"""

import sys

from torch import nn

import dtrain

QUICK = "--quick" in sys.argv


class Slowing(dtrain.syncs.PeriodicSync):
    """Average after updates 1, 2, 4, 8, ..., and every `longest` updates from then on."""

    longest: int = 16  # a field is a key: [sync] name = "own_sync:Slowing", longest = 16

    def is_due(self, clock):  # the same on all replicas: it may depend on the clock alone
        done = clock.update + 1
        return done % self.longest == 0 or (done < self.longest and done & (done - 1) == 0)


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


run = dtrain.Run(
    model=net,
    data=dtrain.data.digits(),
    mesh=dtrain.Mesh(stages=1),  # every rank is a replica
    objective="backprop",
    sync=Slowing(longest=16),
    optimizer=dtrain.Optimizer("sgd", lr=0.1, momentum=0.9),
    epochs=2 if QUICK else 10,
    batch_size=64,
)

if __name__ == "__main__":
    if dtrain.init().size == 1:  # the check makes replicas of its own, as threads
        print(dtrain.testing.check_sync(Slowing(longest=4)))
    result = dtrain.train(run)
    if result.rank == 0:
        sent = result.summary["bytes_intra_node"] + result.summary["bytes_inter_node"]
        print(f"test accuracy {result.test_accuracy:.3f}, {sent:,} bytes sent")
