"""PEPITA: a second forward pass, of the input that the error has modulated, in place of a backward.

Dellaferrera and Kreiman, "Error-driven Input Modulation: Solving the Credit Assignment Problem
without a Backward Pass", ICML 2022, arXiv 2201.11665. With e = softmax(out) - onehot, F (C, d_0)
fixed and random, h_k what leaves block k in the first pass and h'_k in the second::

    F     x  --> block 0 --h_0--> block 1 --h_1--> block 2 --> out  ->  e
             .------------------------ e -------------------------------'
    F/1   x' = x + e F --> block 0 --h'_0--> block 1 --h'_1--> block 2 --> out'
    B                   h_0 - h'_0        h_1 - h'_1           e at out'

With one layer as a block this is the paper's dW_k = (h_k - h'_k) h'_{k-1}^T, dW_L = e h'_{L-1}^T,
without the slope of the activation: the force h_k - h'_k is put on the *pre-activation* of the
block's last layer where that can be tapped (a module `sums`, which layers of `mlp` have), else on
its output. Below that a block backpropagates its own force; the last one's is e on the scores, and
what lies below the head learns from it as by the true loss, not from h - h'. One block makes one
pass and is ordinary backpropagation. The loss that is shown is that of the first pass.

To first order h_k - h'_k = -phi' * (W F e) in the first layer: an adaptive feedback alignment.

The authors' code has the *last* layer learn from the error of the second pass (`error` = "second";
the default is the paper's) and F He-uniform times 0.05 (`scale`). Dropout masks are alike in both
passes, there and here. Batch statistics see both passes, modulated inputs too.

The error has to be back before the second pass begins ("drained"). "pipelined" runs it without a
wait, but do not train so: h_k and h'_k are then made by weights that are K updates apart, the force
undoes what those updates changed, and digits stay near chance.

Invariant: no gradient crosses a block's border; the first pass leaves no graph behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block import Block, Pull
from dtrain.errors import Refusal
from dtrain.live import Given, Live
from dtrain.objectives.objective import Mode, Objective, born, onward
from dtrain.objectives.parts.feedback import Fixed
from dtrain.objectives.task import Task
from dtrain.schedules.action import Point, Route

ERROR, BLOCKS = "error", 3


@final
@dataclass(frozen=True)
class Pepita(Objective):
    """A fixed matrix at the input; prediction: the last block's.

    Parameters
    ----------
    scale : float
        What the matrix, uniform within sqrt(6 / d_0), is multiplied by.
    error : str
        Which pass's error the last block learns from: "first" or "second".
    """

    schedule: ClassVar[str] = "drained"

    scale: float = 0.05
    error: Literal["first", "second"] = "first"

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise Refusal(f"[objective] scale = {self.scale}: give more than 0 (default 0.05)")

    def build(self, task: Task) -> nn.Module | None:
        """Return the matrix at the first of several blocks."""
        first, width = task.block == 0 and task.blocks > 1, math.prod(task.sample)
        return Fixed("kaiming", task.classes, width) if first else None

    def helped(self, task: Task) -> None:
        """Nothing is run: errors are multiplied by a matrix."""

    def copies(self, task: Task) -> int:
        """Return 2 passes; the costs count both as learnt."""
        return 2 if task.blocks > 1 else 1

    def taps(self, block: Block) -> Sequence[str]:
        """Return the pre-activation of the block's last layer, where it can be tapped."""
        name, layer = list(block.layers.items())[-1]
        return [f"{name}.sums"] if isinstance(getattr(layer, "sums", None), nn.Module) else []

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Activations go on, in training twice; between the passes the error goes to the input."""
        if mode == "predict" or blocks == 1:
            return onward(blocks)
        back = Route(Point(blocks - 1, "F"), Point(0, "F", 1), ERROR)
        return (*onward(blocks), *onward(blocks, pass_=1), back)

    def shape(
        self, route: Route, tasks: Sequence[Task], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return (rows, classes) for the error."""
        wide = (rows, tasks[-1].classes), tasks[-1].dtype
        return wide if route.name == ERROR else super().shape(route, tasks, rows)

    def tell(self, route: Route, block: Block, live: Live | None) -> Tensor:
        """Give the error of each sample's own loss."""
        assert live is not None
        return missed(live) if route.name == ERROR else super().tell(route, block, live)

    def traced(self, task: Task, pass_: int) -> bool:
        """The second pass is learnt; the first is the only one where one block learns alone."""
        return pass_ == 1 or task.blocks == 1

    def feed(self, task: Task, block: Block, given: Given) -> Tensor:
        """Return what arrived, or the data; in the second pass modulated."""
        x = super().feed(task, block, given)
        if ERROR not in given.told:
            return x
        assert isinstance(block.helper, Fixed)
        matrix = self.scale * block.helper.feedback
        added = given.told[ERROR].to(matrix.dtype) @ matrix
        return x + added.view_as(x).to(x.dtype)

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the second pass back to where the first was; the last block along the error."""
        first = live.before
        if first is None:
            return [born(live, live.y)]
        share = live.share / len(live.targets)
        if task.last:
            live.loss = cross_entropy(first.y, live.targets)
            return [(live.y, share * missed(first if self.error == "first" else live))]
        end = next((live.taps[name] for name in self.taps(block)), live.y)
        return [(end, share * (first.y - live.y.detach()))]

    def cautions(self, tasks: Sequence[Task], rows: int) -> list[str]:
        """Say that it is for few blocks."""
        if len(tasks) <= BLOCKS:
            return []
        return [
            f"'pepita' modulates the input alone, and its effect fades with depth: {len(tasks)} "
            f"blocks, while 2 or {BLOCKS} layers are usual; set [partition] blocks = {BLOCKS}"
        ]


def missed(live: Live) -> Tensor:
    """Return softmax(y) - onehot (rows, classes)."""
    return live.y.detach().softmax(1) - one_hot(live.targets, live.y.shape[1])
