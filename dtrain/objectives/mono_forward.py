"""Mono-Forward: every block's output classifies through a linear head, and nothing comes back.

Gong, Li and Abdulla, "Mono-Forward", arXiv 2501.09238. With a = the block's output, M (C, d) its
head and G = a M^T the goodness per class, the block learns softmax cross-entropy of G; the last
block learns the true loss through the model's own head. One block is ordinary backpropagation.

Invariant: nothing is added to the stream, so the net that is exported is the net that was trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from dtrain.block import Block, Live, Pull
from dtrain.objectives.objective import VOTES, Mode, Objective, Task, born, onward
from dtrain.schedules.action import Route


@dataclass(frozen=True)
class MonoForward(Objective):
    """A linear head without bias per earlier block; prediction: last block, and the vote (sum)."""

    schedule: ClassVar[str] = "stream"

    def build(self, task: Task) -> nn.Module | None:
        """Return M as a linear map from the flattened output to the classes; none at the end."""
        if task.last:
            return None
        width = math.prod(task.outputs)
        return nn.Sequential(nn.Flatten(), nn.Linear(width, task.classes, bias=False))

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Activations go on; in prediction the sum of the scores so far rides beside them."""
        votes = onward(blocks, VOTES) if mode == "predict" else ()
        return (*onward(blocks), *votes)

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the local loss, or in the last block the true one."""
        return [born(live, self.predict(task, block, live))]

    def predict(self, task: Task, block: Block, live: Live) -> Tensor:
        """Return the goodness per class (rows, classes)."""
        return live.y if block.helper is None else block.helper(live.y)
