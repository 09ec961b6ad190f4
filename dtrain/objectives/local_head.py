"""Decoupled greedy learning (DGL, AugLocal): every earlier block has an auxiliary classifier.

Belilovsky, Eickenberg and Oyallon, "Decoupled greedy learning of CNNs", arXiv 1901.08164; Ma, Wu,
Tang and Zhang, "Scaling supervised local learning with augmented auxiliary networks" (AugLocal),
arXiv 2402.17318. A block and its head learn the cross-entropy of the head's scores. All blocks
learn at the same time; a block sends the activation that it computed before its own update. The
networks are in `head_networks`, the keys in `NetworkHead`.

Heads of sequences are in `decoder_head`. A shared output matrix is the model's own, frozen, as it
was some updates before::

    update         0     1     2     3     4     5     6             refresh = 3, lag = 2, 3 blocks
    block 2        U     U     U     U     U     U     U
    sends          |                 |                 |             after updates 0, 3, 6 ...
    block 1 has    '---------> 0     0     0---> 3     3     ...     of a segment; block 1 gets
    block 0 has    '---------------> 0     0     '---> 3     ...     it 2 updates later, block 0 3

Invariant: the activations are those of the model alone, so the exported model is the trained one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor, nn

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import ExecutionMode, MessageSpec
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.aux_heads import NetworkHead
from dtrain.objectives.common.decoder_head import DecoderHead, decoder_head
from dtrain.objectives.common.field_checks import check_lag
from dtrain.objectives.common.layer_weights import NO_PARAMETERS, flat_parameters
from dtrain.schedules.actions import Point, Route

OUTPUT = "output layer"


@final
@dataclass(frozen=True)
class LocalHead(NetworkHead):
    """A trained network per earlier block. The last block predicts; the vote is the sum of the
    scores.

    Parameters
    ----------
    head : str
        A network of `head_networks`, or "decoder": layers like those that follow the block, and a
        copy of the model's head.
    private_layers : int
        Of "decoder": number of layers before the copy of the model's head.
    output : str
        Of "decoder": "own", a last layer that is trained with the head, or "shared", a frozen copy
        of the model's last layer.
    refresh : int
        Of "shared": updates from one copy of the model's last layer to the next.
    lag : int
        Of "shared": delay of the copy in the last but one block, in updates; each block before it
        gets it one update later. "stream" needs 2 or more.

    Raises
    ------
    ConfigError
        A number is out of range, or "shared" belongs to another head than "decoder".
    """

    head: Literal["greedy", "dgl", "auglocal", "1c2f", "decoder"] = "greedy"  # type: ignore[assignment]
    private_layers: int = 1
    output: Literal["own", "shared"] = "own"
    refresh: int = 10
    lag: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lag(self.lag)
        if self.private_layers < 0:
            raise ConfigError(
                "objective.private-layers-negative",
                f"[objective] private-layers = {self.private_layers} must be at least 0",
            )
        if self.refresh < 1:
            raise ConfigError(
                "objective.refresh-too-small",
                f"[objective] refresh = {self.refresh} must be at least 1 update; for a last layer "
                'that is trained with the head set output = "own"',
            )
        if self.output == "shared" and self.head != "decoder":
            raise ConfigError(
                "objective.shared-output-needs-decoder",
                f'[objective] output = "shared" needs head = "decoder", not "{self.head}": set '
                "one of both",
            )

    @property
    def default_schedule(self) -> str:  # type: ignore[override]
        """Return "stream", or "drained" if a shared output is not late enough for it."""
        return "drained" if self.output == "shared" and self.lag < 2 else "stream"

    @property
    def needs_downstream_layers(self) -> bool:
        """Whether heads have the shapes of later layers, or are like them."""
        return self.head in ("auglocal", "decoder")

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the network that `head` names."""
        if self.head == "decoder":
            return decoder_head(block, self.private_layers, self.output == "shared")
        return super().build_head(block)

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward; in training a shared last layer from the last block to all
        others, every `refresh` updates."""
        routes = super().routes(blocks, mode)
        if mode == "predict" or self.output == "own":
            return routes
        last = Point(blocks - 1, "U")
        copies = (
            Route(last, Point(b, "U"), OUTPUT, self.lag + blocks - 2 - b, every=self.refresh)
            for b in range(blocks - 1)
        )
        return (*routes, *copies)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the weights (parameters,) of the model's last layer."""
        if route.name != OUTPUT:
            return super().make_message(route, block, micro_batch)
        *_, layer = (layer for name, layer in block.layers.items() if name)
        return flat_parameters(layer)

    def message_spec(self, route: Route, specs: Sequence[BlockSpec], rows: int) -> MessageSpec:
        """Return the number of weights, and their dtype."""
        if route.name != OUTPUT:
            return super().message_spec(route, specs, rows)
        spec = specs[route.target.block]
        parameters = spec.downstream_layers[-1].parameters
        return (parameters,), spec.dtype if parameters else NO_PARAMETERS.dtype

    def after_update(self, spec: BlockSpec, block: Block, received: Mapping[str, Tensor]) -> None:
        """Replace the shared last layer if its weights have arrived."""
        if OUTPUT in received:
            assert isinstance(block.head, DecoderHead)
            block.head.load_output(received[OUTPUT])
