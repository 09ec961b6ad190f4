"""DFA: the last block's error goes to every block, through a fixed random matrix.

F   block 0 ---> block 1 ---> block 2 -> e = softmax(y) - onehot
B   e B_0 <----- e B_1 <----- e leaves the last block's B
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from dtrain.objectives.objective import Objective, born, onward
from dtrain.schedules.action import Point, Route


@dataclass(frozen=True)
class Dfa(Objective):
    """Nøkland 2016, arXiv 1609.01596, at the borders of blocks."""

    schedule = "1f1b"

    def build(self, task):
        holder, wide = torch.nn.Module(), (task.classes, math.prod(task.outputs))
        holder.register_buffer("feedback", 2 * torch.rand(wide) - 1)
        return None if task.last else holder

    def helped(self, task): ...

    def routes(self, blocks, mode):
        told = range(blocks - 1) if mode == "train" else ()
        return (*onward(blocks), *(Route(Point(blocks - 1, "B"), Point(b, "B"), "e") for b in told))

    def shape(self, route, tasks, rows):
        wide = (rows, tasks[-1].classes), tasks[-1].dtype
        return wide if route.name == "e" else super().shape(route, tasks, rows)

    def tell(self, route, block, live):
        if route.name != "e":
            return super().tell(route, block, live)
        error = live.y.detach().softmax(1) - one_hot(live.targets, live.y.shape[1])
        return live.share / len(error) * error

    def pulls(self, task, block, live):
        if task.last:
            return [born(live, live.y)]
        return [(live.y, (live.told["e"] @ block.helper.feedback).view_as(live.y))]
