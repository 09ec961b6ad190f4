"""What objectives share that give every earlier block a head of its own, and its own loss.

::

    F   x --> block 0 --y--> block 1 --y--> block 2           nothing comes back
                 |              |              |
    B         heads.0        heads.1        (own head)        softmax cross-entropy of each

The last block learns the true loss through the model's own head, so one block is ordinary
backpropagation.

Invariant: nothing is added to the stream, so the net that is exported is the net that was trained.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from dtrain.block import Block, Pull
from dtrain.live import Live
from dtrain.objectives.objective import VOTES, Mode, Objective, born, onward
from dtrain.objectives.task import Task
from dtrain.schedules.action import Route


class Heads(Objective):
    """A head per earlier block; prediction: last block, and the vote (sum of the scores)."""

    schedule: ClassVar[str] = "stream"

    @abstractmethod
    def network(self, task: Task) -> nn.Module:
        """Return a module from a block's output (rows, ...) to class scores (rows, classes)."""

    def build(self, task: Task) -> nn.Module | None:
        """Return the head of an earlier block, none at the end."""
        return None if task.last else self.network(task)

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Activations go on; in prediction the sum of the scores so far rides beside them."""
        votes = onward(blocks, VOTES) if mode == "predict" else ()
        return (*onward(blocks), *votes)

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the local loss, or in the last block the true one."""
        return [born(live, self.predict(task, block, live))]

    def predict(self, task: Task, block: Block, live: Live) -> Tensor:
        """Return the class scores (rows, classes)."""
        return live.y if block.helper is None else block.helper(live.y)
