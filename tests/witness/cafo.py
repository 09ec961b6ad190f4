"""CaFo in closed form: Zhao et al. 2023, arXiv 2303.09728. Layers stay random.

    per block:  A = sum h h^T,  C = sum h y^T over the samples      W = A^+ C at a segment's end

It needs layers that are not trained, sums that are added over replicas, and `solve`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

from dtrain.block import Block, Pull
from dtrain.live import Live
from dtrain.objectives.heads import Heads
from dtrain.objectives.task import Task


class Solved(nn.Module):
    """A linear map and the sums that it is solved from."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, classes), requires_grad=False)
        self.register_buffer("gram", torch.zeros(width, width))
        self.register_buffer("cross", torch.zeros(width, classes))

    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(1) @ self.weight


@dataclass(frozen=True)
class Cafo(Heads):
    """A least-squares head for every block; the vote is over all of them."""

    trains: ClassVar[bool] = False
    sums: ClassVar[tuple[str, ...]] = ("gram", "cross")

    def network(self, task: Task) -> nn.Module:
        return Solved(math.prod(task.outputs), task.classes)

    def build(self, task: Task) -> nn.Module:
        return self.network(task)

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        features = live.y.detach().flatten(1)
        wanted = one_hot(live.targets, task.classes).to(features.dtype)
        block.helper.gram += features.T @ features
        block.helper.cross += features.T @ wanted
        live.loss = mse_loss(block.helper(features), wanted)
        return []

    def solve(self, task: Task, block: Block) -> None:
        block.helper.weight.copy_(torch.linalg.pinv(block.helper.gram) @ block.helper.cross)
