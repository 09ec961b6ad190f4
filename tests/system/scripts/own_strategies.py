"""Section 4 of the contract: an objective and a sync of one's own, checked and trained."""

import math

import torch
from my_model import run
from torch import nn

import dtrain


class Focal(dtrain.objectives.AuxHead):
    gamma: float = 2.0

    def build_head(self, block):
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(block.output_shape), block.classes))

    def loss(self, output, target):
        logp = torch.log_softmax(output, 1).gather(1, target[:, None])
        return (-((1 - logp.exp()) ** self.gamma) * logp).mean()


class EveryFourth(dtrain.syncs.PeriodicSync):
    def is_due(self, clock):
        return (clock.update + 1) % 4 == 0


if __name__ == "__main__":
    if dtrain.init().size == 1:
        dtrain.testing.check_objective(Focal())
        dtrain.testing.check_sync(EveryFourth())
    own = run.replace(objective=Focal(gamma=1.0), sync=EveryFourth(), epochs=2)
    dtrain.train(own, out="runs/strategies")
