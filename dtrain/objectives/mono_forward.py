"""Mono-Forward: every block's output classifies through a linear head, and nothing comes back.

Gong, Li and Abdulla, "Mono-Forward", arXiv 2501.09238. With a = the block's output, M (C, d) its
head and G = a M^T the goodness per class, the block learns softmax cross-entropy of G; the last
block learns the true loss through the model's own head. One block is ordinary backpropagation.

Invariant: nothing is added to the stream, so the net that is exported is the net that was trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from dtrain.objectives.heads import Heads
from dtrain.objectives.task import Task


@dataclass(frozen=True)
class MonoForward(Heads):
    """A linear head without bias per earlier block; prediction: last block, and the vote (sum)."""

    def network(self, task: Task) -> nn.Module:
        """Return M as a linear map from the flattened output to the classes."""
        width = math.prod(task.outputs)
        return nn.Sequential(nn.Flatten(), nn.Linear(width, task.classes, bias=False))
