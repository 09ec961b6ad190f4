"""NoProp: Li, Teh and Pascanu 2025, arXiv 2503.24322 (discrete time, mean squared error).

    train     every block alone:  z = sqrt(a_t) y + sqrt(1 - a_t) noise,   û = f_t(x, z) -> y
    predict   z_0 = 0 -> z_1 = f_1(x, z_0) -> ... -> z_T = scores

It needs blocks fed from the data alone, layers of its own, and noise that no layout changes.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import mse_loss, one_hot

from dtrain.objectives.objective import ACTIVATION, Objective, onward


@dataclass(frozen=True)
class NoProp(Objective):
    """Blocks that denoise a label, each at its own level of noise."""

    schedule = "stream"
    hidden: int = 16

    def own(self, task):
        fuse = partial(nn.Linear, *self.fed(task), self.hidden)
        return [("fuse", fuse), ("out", partial(nn.Linear, self.hidden, task.classes))]

    def fed(self, task):
        return (math.prod(task.sample) + task.classes,)

    def reads(self, task, mode):
        return True

    def routes(self, blocks, mode):
        return onward(blocks) if mode == "predict" else ()

    def feed(self, task, block, given):
        x = given.sample.flatten(1)
        z = given.told.get(ACTIVATION, x.new_zeros(len(x), task.classes))
        if given.learning:
            clean = task.block / task.blocks
            noise = given.draws.rows_of(
                "noise", lambda n, g: torch.randn(n, task.classes, generator=g, dtype=x.dtype)
            )
            z = clean**0.5 * one_hot(given.targets, task.classes) + (1 - clean) ** 0.5 * noise
        return torch.cat([x, z], 1)

    def pulls(self, task, block, live):
        loss = mse_loss(live.y, one_hot(live.targets, task.classes).to(live.y.dtype))
        live.loss = loss.detach()
        return [(loss, torch.full_like(loss, live.share))]

    def predict(self, task, block, live):
        return live.y
