"""PEPITA: two forward passes, no backward; Dellaferrera and Kreiman 2022, ICML; for the `mlp`.

pass 0    x -> h_1 -> ... -> out,  e = softmax(out) - onehot      x' = x + F e
pass 1    x' -> h'_1 -> ... -> h'_L      dW_k = (h_k - h'_k) h'_{k-1}^T,  dW_L = e h'_{L-1}^T
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, one_hot

from dtrain.objectives.objective import Objective, onward
from dtrain.schedules.action import Point, Route


@dataclass(frozen=True)
class Pepita(Objective):
    schedule = "drained"
    grain = "layer"
    scale: float = 0.05

    def build(self, task):
        holder, width = torch.nn.Module(), math.prod(task.sample)
        uniform = (2 * torch.rand(task.classes, width) - 1) * (6 / width) ** 0.5
        holder.register_buffer("feedback", self.scale * uniform)
        return None if task.block else holder

    def taps(self, block):
        return [f"{name}.sums" for name in block.layers]

    def helped(self, task): ...

    def routes(self, blocks, mode):
        error = Route(Point(blocks - 1, "F"), Point(0, "F", 1), "error")
        again = (*onward(blocks, pass_=1), error) if mode == "train" else ()
        return (*onward(blocks), *again)

    def feed(self, task, block, given):
        x = super().feed(task, block, given)
        error = given.told.get("error")
        return x if error is None else x + (error @ block.helper.feedback).view_as(x)

    def tell(self, route, block, live):
        return self.error(live) if route.name == "error" else super().tell(route, block, live)

    def shape(self, route, tasks, rows):
        wide = (rows, tasks[0].classes), tasks[-1].dtype
        return wide if route.name == "error" else super().shape(route, tasks, rows)

    def error(self, live):
        return live.y.softmax(1) - one_hot(live.targets, live.y.shape[1])

    def pulls(self, task, block, live):
        moved = {n: live.before.outs[n] - out.detach() for n, out in live.outs.items()}
        if task.last:
            moved[[*moved][-1]] = self.error(live.before)
            live.loss = cross_entropy(live.before.y, live.targets)
        share = live.share / len(live.targets)
        return [(live.taps[f"{n}.sums"], share * step) for n, step in moved.items()]
