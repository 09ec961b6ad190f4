"""MAN: an earlier block learns through a slow copy of the first layer of the block behind it.

Su, Cai, Zhu et al., "Momentum auxiliary network for supervised local learning", arXiv 2407.05623::

    y_k    = LB_k(h_k) + EMA_k(h_k)                            h_k, not y_k, is streamed
    loss_k = lambda1 reconstruction(decoder(y_k)) + lambda2 CE(head(y_k))
    EMA_k <- m EMA_k + (1 - m) theta                           after the block's update

    block k                              block k + 1
    h_k ----------------------------->   first layer, theta ---> ...
     |-- EMA_k  <-------- theta, `lag` updates late ---'U
     |-- LB_k, trained            (U: when the block has been updated)
     + -- y_k -> decoder, head

EMA_k (no gradient reaches its weights, though h_k is taught through them) and LB_k are copies of
the next block's first layer. theta travels as one flat tensor per update. With a lag of 2 updates
nobody waits under "stream"; nothing arrives in the first `lag` updates of a segment, where EMA_k
rests. ``momentum = 1`` never moves it and sends nothing.

Only parameters are averaged, as in the authors' code. Batch statistics of a copy are its own: those
of the next block are of activations that other weights made. They serve the head's predictions.

Quirks of the authors' code. It draws the convolutions of both copies anew after they were copied
(``start = "drawn"``). It reads theta before the block's step, which is a lag of 1. It goes from the
first lambdas to the last by the number 1 ... 3 of the resolution over K - 2: with 16 blocks, from
(5, 0.5) to (0, 0), they never fall below 79 % of their start, with 4 they overshoot. Here the
block's number decides. That end would switch the last local loss off, and is refused; by default
lambdas stay (5, 0.5).

Invariant: nothing is added to the stream, so the net that is exported is the net that was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from dtrain.block import Block
from dtrain.errors import Refusal
from dtrain.live import Live
from dtrain.objectives.objective import Mode
from dtrain.objectives.parts.copies import NOTHING, Pair, flat
from dtrain.objectives.parts.informed import Informed, Parts
from dtrain.objectives.task import Task
from dtrain.schedules.action import Point, Route

LAYER = "layer"


@final
@dataclass(frozen=True)
class Man(Informed):
    """Features behind two copies of the next layer; prediction: last block, and the vote (sum).

    Parameters
    ----------
    momentum : float
        m, 0 to 1.
    start : str
        What the copies start from: "next", the first weights of the layer that they copy, or
        "drawn", others, each copy its own.
    lag : int
        Updates that weights travel; "stream" needs 2 or more.
    """

    ahead: ClassVar[bool] = True

    lambda_last: tuple[float, ...] = (5.0, 0.5)
    momentum: float = 0.995
    start: Literal["next", "drawn"] = "next"
    lag: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum <= 1:
            raise Refusal(f"[objective] momentum = {self.momentum}: give 0 to 1, as 0.995")
        if self.lag < 0:
            raise Refusal(f"[objective] lag = {self.lag}: give at least 0; 'stream' needs 2")

    def path(self, task: Task) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the two copies, and the shape that leaves them."""
        layer = task.later[0]
        return Pair(layer.make(), anew=self.start == "drawn"), layer.outputs

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """In training a layer's weights come back once per update as well."""
        down = range(blocks - 1) if mode == "train" and self.momentum < 1 else ()
        back = (Route(Point(b + 1, "U"), Point(b, "U"), LAYER, self.lag) for b in down)
        return (*super().routes(blocks, mode), *back)

    def tell(self, route: Route, block: Block, live: Live | None) -> Tensor:
        """Return the weights of the block's first layer, flat."""
        if route.name != LAYER:
            return super().tell(route, block, live)
        return flat(next(iter(block.layers.values())))

    def shape(
        self, route: Route, tasks: Sequence[Task], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype: what a layer with weights is fed is of their dtype."""
        if route.name != LAYER:
            return super().shape(route, tasks, rows)
        task = tasks[route.target.block]
        number = task.later[0].parameters
        return (number,), task.dtype if number else NOTHING.dtype

    def after_update(self, task: Task, block: Block, told: Mapping[str, Tensor]) -> None:
        """Let EMA follow, where weights arrived."""
        if LAYER in told:
            assert isinstance(block.helper, Parts)
            assert isinstance(block.helper.path, Pair)
            block.helper.path.follow(told[LAYER], self.momentum)

    def cautions(self, tasks: Sequence[Task], rows: int) -> list[str]:
        """Tell of blocks with nothing to follow."""
        idle = [task for task in tasks if not task.last and not task.later[0].parameters]
        return [
            f"block {task.block + 1} begins with layer '{task.later[0].name}', which has no "
            f"parameters, so block {task.block} has no weights to follow: cut before a layer that "
            "has some"
            for task in idle
        ]
