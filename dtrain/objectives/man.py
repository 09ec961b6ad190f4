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
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from dtrain.block.block import Block
from dtrain.block.low_rank import merged_parameters
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import ExecutionMode
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.reconstruction import Reconstruction, ReconstructionHead
from dtrain.schedules.actions import Point, Route

LAYER = "layer"


@final
@dataclass(frozen=True)
class Man(Reconstruction):
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

    needs_downstream_layers: ClassVar[bool] = True

    lambda_last: tuple[float, ...] = (5.0, 0.5)
    momentum: float = 0.995
    start: Literal["next", "drawn"] = "next"
    lag: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum <= 1:
            raise ConfigError(
                "todo.key", f"[objective] momentum = {self.momentum}: give 0 to 1, as 0.995"
            )
        if self.lag < 0:
            raise ConfigError(
                "todo.key", f"[objective] lag = {self.lag}: give at least 0; 'stream' needs 2"
            )

    def feature_path(self, spec: BlockSpec) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the two copies, and the shape that leaves them."""
        layer = spec.downstream_layers[0]
        return EmaPair(layer.make(), redraw=self.start == "drawn"), layer.output_shape

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """In training a layer's weights come back once per update as well."""
        down = range(blocks - 1) if mode == "train" and self.momentum < 1 else ()
        back = (Route(Point(b + 1, "U"), Point(b, "U"), LAYER, self.lag) for b in down)
        return (*super().routes(blocks, mode), *back)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the weights of the block's first layer, flat."""
        if route.name != LAYER:
            return super().make_message(route, block, micro_batch)
        return flat_parameters(next(iter(block.layers.values())))

    def message_spec(
        self, route: Route, specs: Sequence[BlockSpec], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype: what a layer with weights is fed is of their dtype."""
        if route.name != LAYER:
            return super().message_spec(route, specs, rows)
        task = specs[route.target.block]
        number = task.downstream_layers[0].parameters
        return (number,), task.dtype if number else NO_PARAMETERS.dtype

    def after_update(self, spec: BlockSpec, block: Block, received: Mapping[str, Tensor]) -> None:
        """Let EMA follow, where weights arrived."""
        if LAYER in received:
            assert isinstance(block.head, ReconstructionHead)
            assert isinstance(block.head.path, EmaPair)
            block.head.path.update_ema(received[LAYER], self.momentum)

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Tell of blocks with nothing to follow."""
        idle = [
            task for task in specs if not task.is_last and not task.downstream_layers[0].parameters
        ]
        return [
            f"block {task.index + 1} begins with layer '{task.downstream_layers[0].name}', which has no "
            f"parameters, so block {task.index} has no weights to follow: cut before a layer that "
            "has some"
            for task in idle
        ]


NO_PARAMETERS = torch.empty(0, dtype=torch.float32)
"""All parameters of a layer without any."""


@final
class EmaPair(nn.Module):
    """The two copies; `layer` becomes one of them, and both are drawn `anew` where that is asked.

    Parameters
    ----------
    layer : nn.Module
        A layer that nobody else holds.
    anew : bool
        Whether the copies start from other weights, each from its own.
    """

    def __init__(self, layer: nn.Module, redraw: bool = False) -> None:
        super().__init__()
        self.learnt, self.slow = layer, deepcopy(layer).requires_grad_(False)
        self.works_in_place = any(getattr(each, "inplace", False) for each in layer.modules())
        if redraw:
            _redraw_weights(self.learnt)
            _redraw_weights(self.slow)

    def forward(self, input: Tensor) -> Tensor:
        """Return the sum of what both make of the same input."""
        first, second = (input.clone(), input.clone()) if self.works_in_place else (input, input)
        made: Tensor = self.learnt(first) + self.slow(second)
        return made

    @torch.no_grad()
    def update_ema(self, theta: Tensor, momentum: float) -> None:
        """Average `theta`, the flat parameters of the layer that was copied, into the slow copy."""
        own = list(self.slow.parameters())
        parts = torch.split(theta, [each.numel() for each in own])
        for each, new in zip(own, parts, strict=True):
            each.mul_(momentum).add_(new.view_as(each), alpha=1 - momentum)


def flat_parameters(layer: nn.Module) -> Tensor:
    """Return all parameters of a layer in one row, in new memory."""
    parts = [each.flatten() for each in merged_parameters(layer)]
    return torch.cat(parts) if parts else NO_PARAMETERS


def _redraw_weights(layer: nn.Module) -> None:
    """Draw the weights of convolutions anew, normal with variance 2 / (k^2 outputs), and linear
    maps as torch does."""
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
