"""CCL, counter-current learning: Kao and Hariharan 2024, arXiv 2409.19841 (classification).

    forward net    a_0 -> a_1 -> ... -> a_K             a_k (rows, d_k)
    feedback net   c_0 <- c_1 <- ... <- c_K = codes     c_k = V_k sg(c_{k+1}) (classes, d_k)
    block k learns W_k and V_k from MSE(a_k c_k^T / d_k, onehot), the last one cross entropy

It needs a feedback network shaped by the next block, and codes that travel back once per update.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import mse_loss, one_hot

from dtrain.objectives.objective import Objective, born, onward
from dtrain.schedules.action import Point, Route

CODES = "codes"


@dataclass(frozen=True)
class Ccl(Objective):
    """Anti-parallel streams; `lag` in updates."""

    schedule = "1f1b"
    lag: int = 0

    def build(self, task):
        return None if task.last else nn.Linear(math.prod(task.above), math.prod(task.outputs))

    def helped(self, task): ...

    def routes(self, blocks, mode):
        down = reversed(range(blocks - 1)) if mode == "train" else ()
        back = (Route(Point(b + 1, "B"), Point(b, "B"), CODES, self.lag, True) for b in down)
        return (*onward(blocks), *back)

    def shape(self, route, tasks, rows):
        above = tasks[route.source.block]
        wide = (above.classes, math.prod(above.outputs)), above.dtype
        return wide if route.name == CODES else super().shape(route, tasks, rows)

    def tell(self, route, block, live):
        if route.name != CODES:
            return super().tell(route, block, live)
        top = block.helper is None
        return torch.eye(live.y.shape[1]).to(live.y) if top else live.told["own"].detach()

    def pulls(self, task, block, live):
        if task.last:
            return [born(live, live.y)]
        width = block.helper.in_features
        codes = live.told.get(CODES, live.y.new_zeros(task.classes, width))
        own = live.told["own"] = block.helper(codes)
        scores = live.y.flatten(1) @ own.T / own.shape[1]
        loss = mse_loss(scores, one_hot(live.targets, task.classes).to(scores.dtype))
        live.loss = loss.detach()
        return [(loss, torch.full_like(loss, live.share))]
