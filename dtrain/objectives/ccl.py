"""CCL, counter-current learning: a feedback net of its own, whose codes flow against the stream.

Kao and Hariharan 2024, arXiv 2409.19841 (classification). With a_k the flat output of block k
(rows, d_k) and sg a detached tensor, the feedback layer V_k (d_k, d_{k+1}) makes one code per
class, c_k = psi(V_k sg(c_{k+1})), and both learn the mean squared error of a_k c_k^T to one-hot::

    forward   x --> block 0 --a_0--> block 1 --a_1--> block 2 (own head)   cross-entropy
    codes         V_0 c_1  <--c_1--  V_1 c_2          c_2 = one-hot codes, known, so not sent

Codes are C x d_k numbers, once per update, whatever the batch is: a block makes them after it, and
the block below uses them in the next one, or `lag` updates later. They stand in a buffer, where the
next segment finds the last that came. It starts with zeros, which teach nothing: block k of K
stands still in the first ``lag * (K - 2 - k) + 1`` updates, but the one below the last in none.
One block is ordinary backpropagation.

The reference code multiplies the *loss* by 256 * scale / d_k, not the scores (this matters to SGD;
its runs use a rate of 1), masks by the prediction of the last block, which earlier ones do not have
here (`filter` looks at the block's own score), mirrors convolutions (here images are averaged to
`features` numbers), and trains a layer towards the input on which nothing depends (left out).

Invariant: nothing of the feedback net enters the stream, so the net that is exported is the net
that was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

from dtrain.block import Block, Pull
from dtrain.errors import Refusal
from dtrain.live import Live
from dtrain.objectives.objective import Mode, Objective, born, onward
from dtrain.objectives.parts import pooling
from dtrain.objectives.parts.mirror import Mirror, Psi
from dtrain.objectives.task import Task
from dtrain.schedules.action import Point, Route

CODES, UNITS = "codes", 256  # the width at which the loss is `scale` times the squared error


@final
@dataclass(frozen=True)
class Ccl(Objective):
    """Anti-parallel streams; prediction: the forward net's last block.

    Parameters
    ----------
    lag : int
        Updates that codes come late. With 2 nobody waits for them; with 0 each update has those of
        the one before it, under "drained".
    scale : float
        The loss is multiplied by 256 * scale / d_k.
    filter : float
        Samples whose own score is nearer to 1 than that are not learnt; 0: all are.
    psi : str
        What follows a feedback layer: "elu" (the reference's) or "none".
    features : int
        The most numbers of an image that enter; flat outputs enter whole.
    """

    lag: int = 2
    scale: float = 0.5
    filter: float = 0.0
    psi: Psi = "elu"
    features: int = 256

    def __post_init__(self) -> None:
        pooling.check(self.features)
        if min(self.lag, self.filter) < 0:
            found = f"lag = {self.lag}, filter = {self.filter}"
            raise Refusal(f"[objective] {found}: give at least 0 for both")
        if self.scale <= 0:
            raise Refusal(f"[objective] scale = {self.scale}: give more than 0 (default 0.5)")

    @property
    def schedule(self) -> str:
        """Stream where the codes come late enough for it."""
        return "stream" if self.lag > 1 else "drained"

    def build(self, task: Task) -> nn.Module | None:
        """Return the feedback layer of an earlier block; the one below the last has its codes."""
        if task.last:
            return None
        shape = task.classes, pooling.width(task.above, self.features)
        codes = torch.eye(*shape) if task.block == task.blocks - 2 else torch.zeros(shape)
        return Mirror(codes, task.outputs, self.features, self.psi)

    def helped(self, task: Task) -> None:
        """The feedback layer sees classes, once per micro-batch, and no samples."""

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Activations go on; in training codes come back, but from the last block's."""
        down = reversed(range(blocks - 2)) if mode == "train" else ()
        back = (Route(Point(b + 1, "U"), Point(b, "U"), CODES, self.lag) for b in down)
        return (*onward(blocks), *back)

    def shape(
        self, route: Route, tasks: Sequence[Task], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return (classes, d_{k+1}) for codes."""
        above = tasks[route.source.block]
        wide = (above.classes, pooling.width(above.outputs, self.features)), above.dtype
        return wide if route.name == CODES else super().shape(route, tasks, rows)

    def tell(self, route: Route, block: Block, live: Live | None) -> Tensor:
        """Give the codes that the block will learn with next."""
        if route.name != CODES:
            return super().tell(route, block, live)
        assert isinstance(block.helper, Mirror)
        return block.helper.made().detach()

    def after_update(self, task: Task, block: Block, told: Mapping[str, Tensor]) -> None:
        """Keep the codes that have come."""
        if CODES in told:
            assert isinstance(block.helper, Mirror)
            block.helper.codes.copy_(told[CODES])

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the scores against the codes, which teaches the layers and the feedback layer."""
        if block.helper is None:
            return [born(live, live.y)]
        scores, wanted = block.helper(live.y), one_hot(live.targets, task.classes)
        if self.filter:
            left = (scores.detach() - wanted).abs().mul(wanted).sum(1, keepdim=True)
            scores = scores * (left >= self.filter)
        units = UNITS / pooling.width(task.outputs, self.features)
        loss = self.scale * units * mse_loss(scores, wanted.to(scores.dtype))
        live.loss = loss.detach()
        return [(loss, torch.full_like(loss, live.share))]

    def predict(self, task: Task, block: Block, live: Live) -> Tensor:
        """Return the scores against the class codes, in the last block the model's."""
        return live.y if block.helper is None else block.helper(live.y)
