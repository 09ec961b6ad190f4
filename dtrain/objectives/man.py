"""MAN, momentum auxiliary network: an earlier block learns through an EMA of the next layer.

Su, Cai, Zhu et al., "Momentum auxiliary network for supervised local learning", arXiv 2407.05623.
With theta the weights of the next block's first layer::

    y_k    = LB_k(h_k) + EMA_k(h_k)                            h_k, not y_k, is sent forward
    loss_k = lambda1 reconstruction(decoder(y_k)) + lambda2 CE(head(y_k))
    EMA_k <- m EMA_k + (1 - m) theta                           after the block's update

    block k                              block k + 1
    h_k ----------------------------->   first layer, theta ---> ...
     |-- EMA_k  <-------- theta, `lag` updates late ---'U
     |-- LB_k, trained            (U: after the update of the block)
     + -- y_k -> decoder, head

EMA_k and LB_k are copies of the next block's first layer. LB_k is trained. The weights of EMA_k get
no gradient, but h_k learns through them. theta is sent as one flat tensor per update. With a lag of
2 updates no block waits under "stream". In the first `lag` updates of a segment nothing arrives and
EMA_k does not change. With ``momentum = 1`` it never changes and nothing is sent.

Only parameters are averaged, as in the authors' code. Batch statistics of a copy are its own, since
those of the next block belong to activations of other weights; the head's predictions use them.

Quirks of the authors' code. It draws the convolutions of both copies again after copying
(``start = "drawn"``). It reads theta before the block's step, which is a lag of 1. It changes the
lambdas by the number 1 ... 3 of the resolution over K - 2: with 16 blocks, from (5, 0.5) to (0, 0),
they never fall below 79 % of their start, with 4 they overshoot. Here the block's number decides.
The end (0, 0) would switch the last local loss off and is an error here; by default the lambdas
stay (5, 0.5).

Invariant: the activations are those of the model alone, so the exported model is the trained one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import ExecutionMode, MessageSpec, backward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.field_checks import check_lag
from dtrain.objectives.common.layer_weights import NO_PARAMETERS, flat_parameters, split_like
from dtrain.objectives.common.reconstruction import Reconstruction, ReconstructionHead
from dtrain.schedules.actions import Route

LAYER = "layer"


@final
@dataclass(frozen=True)
class Man(Reconstruction):
    """Features behind two copies of the next layer. The last block predicts; the vote is the sum of
    the scores.

    Parameters
    ----------
    momentum : float
        m, 0 to 1.
    start : str
        Initial weights of the copies: "next", those of the layer that they copy, or "drawn",
        different ones for each copy.
    lag : int
        Delay of the weights in updates; "stream" needs 2 or more.

    Raises
    ------
    ConfigError
        A pair of lambdas, `momentum` or `lag` is out of range.
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
                "objective.momentum-out-of-range",
                f"[objective] momentum = {self.momentum} must be between 0 and 1, as 0.995",
            )
        check_lag(self.lag)

    def feature_path(self, spec: BlockSpec) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the two copies, and the shape of their output."""
        layer = spec.downstream_layers[0]
        return EmaPair(layer.make(), redraw=self.start == "drawn"), layer.output_shape

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward; in training the weights of a layer back, once per update."""
        sends_layer = mode == "train" and self.momentum < 1
        weights = backward_routes(blocks, LAYER, "U", self.lag) if sends_layer else ()
        return (*super().routes(blocks, mode), *weights)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the weights (parameters,) of the block's first layer."""
        if route.name != LAYER:
            return super().make_message(route, block, micro_batch)
        return flat_parameters(next(iter(block.layers.values())))

    def message_spec(self, route: Route, specs: Sequence[BlockSpec], rows: int) -> MessageSpec:
        """Return the number of weights, and their dtype: a layer with weights has that of its
        input."""
        if route.name != LAYER:
            return super().message_spec(route, specs, rows)
        spec = specs[route.target.block]
        parameters = spec.downstream_layers[0].parameters
        return (parameters,), spec.dtype if parameters else NO_PARAMETERS.dtype

    def after_update(self, spec: BlockSpec, block: Block, received: Mapping[str, Tensor]) -> None:
        """Update the EMA if weights have arrived."""
        if LAYER in received:
            assert isinstance(block.head, ReconstructionHead)
            assert isinstance(block.head.path, EmaPair)
            block.head.path.update_ema(received[LAYER], self.momentum)

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of blocks whose next layer has no parameters."""
        next_layers = {spec.index: spec.downstream_layers[0] for spec in specs if not spec.is_last}
        return [
            f"block {index + 1} begins with layer '{layer.name}', which has no parameters, so "
            f"block {index} has no weights to average: cut before a layer with parameters"
            for index, layer in next_layers.items()
            if not layer.parameters
        ]


@final
class EmaPair(nn.Module):
    """A trained copy of a layer and an exponential moving average (EMA) of the layer's weights.

    ::

                .-- learnt --.
        h ------|            (+)--> LB(h) + EMA(h)
                '-- slow ----'         slow <- m slow + (1 - m) theta

    Invariant: no gradient reaches the weights of `slow`; only `update_ema` changes them.

    Parameters
    ----------
    layer : nn.Module
        A layer that nothing else uses; it becomes the trained copy.
    redraw : bool
        Whether both copies start from new weights, each from its own.
    """

    def __init__(self, layer: nn.Module, redraw: bool = False) -> None:
        super().__init__()
        self.learnt, self.slow = layer, deepcopy(layer).requires_grad_(False)
        self.works_in_place = any(getattr(part, "inplace", False) for part in layer.modules())
        if redraw:
            _redraw_weights(self.learnt)
            _redraw_weights(self.slow)

    def forward(self, input: Tensor) -> Tensor:
        """Return the sum of the outputs of both copies for one input (rows, ...)."""
        first, second = (input.clone(), input.clone()) if self.works_in_place else (input, input)
        output: Tensor = self.learnt(first) + self.slow(second)
        return output

    @torch.no_grad()
    def update_ema(self, theta: Tensor, momentum: float) -> None:
        """Average the flat parameters `theta` (parameters,) of the copied layer into the EMA."""
        parts = split_like(theta, self.slow)
        for parameter, new in zip(self.slow.parameters(), parts, strict=True):
            parameter.mul_(momentum).add_(new, alpha=1 - momentum)


def _redraw_weights(layer: nn.Module) -> None:
    """Draw weights anew: of convolutions normal with variance 2 / (k^2 outputs), of linear maps as
    torch does."""
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
