"""Forward-Forward as two passes, and DFA: two more that seams must carry.

Forward-Forward   pass 0: positives, pass 1: negatives; goodness = mean of squares
DFA               the last block's error goes to every block, through a fixed random matrix
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize, one_hot, softplus

from dtrain.objectives.objective import Objective, onward


@dataclass(frozen=True)
class Forward(Objective):
    """Hinton 2022, arXiv 2212.13345; negatives are wrong labels. No block has class scores."""

    def routes(self, blocks, mode):
        return (*onward(blocks), *(onward(blocks, pass_=1) if mode == "train" else ()))

    def feed(self, task, block, given):
        if task.block:
            return normalize(super().feed(task, block, given).flatten(1))
        labels = given.targets
        if given.pass_:
            shift = given.draws.rows_of(
                "wrong", lambda n, g: torch.randint(1, 3, (n,), generator=g)
            )
            labels = (labels + shift) % task.classes
        x = given.sample.flatten(1).clone()
        x[:, : task.classes] = one_hot(labels, task.classes).to(x)
        return x

    def pulls(self, task, block, live):
        good, bad = (each.y.square().mean(1) for each in live.passes())
        loss = (softplus(1 - good) + softplus(bad - 1)).mean()
        live.loss = loss.detach()
        return [(loss, torch.full_like(loss, live.share))]

    def predict(self, task, block, live):
        return -live.y.square() if task.last else None
