"""CaFo, cascaded forward: every block's output is read by a linear head; blocks may stay random.

Zhao et al., "The cascaded forward algorithm for neural network training", arXiv 2303.09728. With h
the features of a sample, y its one-hot label and W_k the head of block k::

    x --> block 0 --h--> block 1 --h--> block 2
             |              |              |
            W_0            W_1       W_2, own head
             '--- sum of softmax(W_k h) ---'-----> class

    "least-squares"       W = (sum h h^T)^-1 sum h y^T, at a segment's end
    "ce", "sparsemax"     W learns that loss by the run's optimizer; the latter votes by sparsemax

"random" blocks keep their first weights: nothing runs backward. "trained" ones learn from the loss
of their own head (of least squares: by the W of the segment before). The paper's trained form is
said to use direct feedback alignment; the authors' code has none. It has no bias in its heads
either, descends over the whole training split from weights of 1, and takes up to 8192 features as
they are (set `features`). The last linear map of the model's own head is solved, or learns, too.

Sums grow over the epochs while blocks are random: the same equations, or more views of the samples
where they are augmented. Trained blocks move, so sums start anew once they hold an epoch; a run
that ends inside an epoch is solved from that part of it. Before a solution heads are as drawn.

Invariant: with random blocks nothing but heads moves, batch statistics apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block import Block, Pull
from dtrain.live import Live
from dtrain.objectives.parts import pooling
from dtrain.objectives.parts.heads import Heads
from dtrain.objectives.parts.readout import Readout, above, features, head, squares, tap, warnings
from dtrain.objectives.parts.sparsemax import sparsemax, sparsemax_loss
from dtrain.objectives.task import Task

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "least-squares": squares,
    "ce": cross_entropy,
    "sparsemax": sparsemax_loss,
}


@final
@dataclass(frozen=True)
class Cafo(Heads):
    """A linear head per block, and the vote of all.

    Parameters
    ----------
    head : str
        "least-squares", "ce" or "sparsemax".
    blocks : str
        "random" or "trained".
    features : int
        The most numbers of an image that enter a head; flat outputs enter whole.
    """

    sums: ClassVar[tuple[str, ...]] = ("gram", "cross")
    head: Literal["least-squares", "ce", "sparsemax"] = "least-squares"
    blocks: Literal["random", "trained"] = "random"
    features: int = 2048

    def __post_init__(self) -> None:
        pooling.check(self.features)

    @property
    def solved(self) -> bool:
        """Whether heads are solved in closed form."""
        return self.head == "least-squares"

    @property
    def ahead(self) -> bool:
        """Whether it looks at the layer that is the model's head: its sums are as wide."""
        return self.solved

    @property
    def trains(self) -> bool:
        """Whether the layers learn; if not they keep their first weights, the head apart."""
        return self.blocks == "trained"

    @property
    def votes(self) -> bool:
        """The prediction is that of all blocks."""
        return True

    def freezes(self, task: Task, layers: Mapping[str, nn.Module]) -> Iterable[nn.Module]:
        """All layers that are random, but not a head that learns; a head that is solved."""
        *below, last = layers.values()
        random = [] if self.trains else below if task.last else [*below, last]
        return [*random, head(last)] if task.last and self.solved else random

    def width(self, task: Task) -> int:
        """Return how many features of a sample enter the head."""
        own = task.last and self.solved
        return above(task).in_features if own else pooling.width(task.outputs, self.features)

    def network(self, task: Task) -> Readout:
        """Return the head of an earlier block; in the last one the sums for the model's own."""
        pool = nn.Identity() if task.last else pooling.pooled(task.outputs, self.features)
        return Readout(pool, self.width(task), task.classes, self.solved, scores=not task.last)

    def build(self, task: Task) -> nn.Module | None:
        """Return the head, none where the model's own learns."""
        return self.network(task) if self.solved or not task.last else None

    def helped(self, task: Task) -> tuple[int, ...] | None:
        """Return the shape of the output, in the last block that of the features."""
        return (self.width(task),) if task.last else task.outputs

    def taps(self, block: Block) -> Sequence[str]:
        """Keep what enters the map that is solved in the last block."""
        tap(block)
        return ()

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Add the samples up, where heads are solved, and pull the loss of the head."""
        made = None if block.helper is None else block.helper(features(block, live), live.targets)
        loss = LOSSES[self.head](live.y if task.last or made is None else made, live.targets)
        live.loss = loss.detach()
        return [(loss, torch.full_like(loss, live.share))]

    def solve(self, task: Task, block: Block) -> None:
        """Solve the head from the sums, but the model's own where a user froze the last block."""
        if not self.solved or (task.last and task.frozen):
            return
        assert isinstance(block.helper, Readout)
        *_, last = block.layers.values()
        block.helper.solve(block.helper.linear or head(last))
        if self.trains and block.helper.rows >= task.samples:
            block.helper.forget()

    def vote(self, task: Task, scores: Tensor) -> Tensor:
        """Return probabilities (rows, classes)."""
        return sparsemax(scores) if self.head == "sparsemax" else scores.softmax(1)

    def cautions(self, tasks: Sequence[Task], rows: int) -> list[str]:
        """Tell what wide sums take, and of more features than samples."""
        widths = [self.width(task) for task in tasks] if self.solved else []
        return warnings(widths, tasks[0].samples)
