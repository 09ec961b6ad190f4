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
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.models.image_layers import Norm
from dtrain.objectives.base import VOTES, ExecutionMode, Objective, forward_routes, scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import head_networks as networks
from dtrain.objectives.common.head_networks import UnitKind
from dtrain.schedules.actions import Route


class AuxHead(Objective):
    """A head per earlier block; prediction: last block, and the vote (sum of the scores)."""

    default_schedule: ClassVar[str] = "stream"

    @abstractmethod
    def head_network(self, spec: BlockSpec) -> nn.Module:
        """Return a module from a block's output (rows, ...) to class scores (rows, classes)."""

    def build_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return the head of an earlier block, none at the end."""
        return None if spec.is_last else self.head_network(spec)

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Activations go on; in prediction the sum of the scores so far rides beside them."""
        votes = forward_routes(blocks, VOTES) if mode == "predict" else ()
        return (*forward_routes(blocks), *votes)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the local loss, or in the last block the true one."""
        return [scaled_loss_pair(micro_batch, self.predict(spec, block, micro_batch))]

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the class scores (rows, classes)."""
        return micro_batch.y if block.head is None else block.head(micro_batch.y)


@dataclass(frozen=True)
class NetworkHead(AuxHead):
    """A learned network per earlier block.

    Parameters
    ----------
    head : str
        "greedy", "dgl", "auglocal" or "1c2f" (that of InfoPro, without its decoder).
    norm : str
        Of all but "greedy": "batch" (the papers'; couples the samples of a micro-batch), "group"
        or "none".
    groups : int
        Of "group": groups of channels.
    hidden : int
        Of "dgl": linear layers before the one to the classes.
    depth : int
        Of "auglocal": units of the first block's head.
    pyramid : float
        Of "auglocal": what part of the units beyond the first is gone in the last but one block;
        0 gives all blocks as many.
    unit : str
        Of "auglocal", for images: "residual" (two 3x3 convolutions beside a shortcut, which
        projects where the shape changes) or "convolution" (one of 3x3).
    """

    head: Literal["greedy", "dgl", "auglocal", "1c2f"] = "greedy"
    norm: Norm = "batch"
    groups: int = 8
    hidden: int = 3
    depth: int = 2
    pyramid: float = 0.5
    unit: UnitKind = "residual"

    def __post_init__(self) -> None:
        if self.hidden < 0:
            raise ConfigError("todo.key", f"[objective] hidden = {self.hidden}: give at least 0")
        if self.depth < 1:
            raise ConfigError(
                "todo.key",
                f'[objective] depth = {self.depth}: give at least 1, or head = "greedy" for none',
            )
        if not 0 <= self.pyramid <= 1:
            raise ConfigError(
                "todo.key", f"[objective] pyramid = {self.pyramid}: give 0 (no pyramid) to 1"
            )

    @property
    def needs_downstream_layers(self) -> bool:
        """Whether heads are shaped by the layers that come later."""
        return self.head == "auglocal"

    @property
    def scales_to_many_blocks(self) -> bool:
        """Whether the head was published for many blocks."""
        return self.head == "auglocal"

    def head_network(self, spec: BlockSpec) -> nn.Module:
        """Return the head for outputs of `task`."""
        match self.head:
            case "dgl":
                return networks.dgl(
                    spec.output_shape, spec.classes, self.norm, self.groups, self.hidden
                )
            case "1c2f":
                return networks.one_convolution(
                    spec.output_shape, spec.classes, self.norm, self.groups
                )
            case "auglocal":
                shapes = [
                    each.output_shape for each in spec.downstream_layers[:-1]
                ]  # the model's head apart
                wanted = networks.sample_shapes(shapes, self.unit_count(spec))
                return networks.auglocal(
                    spec.output_shape, wanted, spec.classes, self.unit, self.norm, self.groups
                )
        return networks.greedy(spec.output_shape, spec.classes)

    def unit_count(self, spec: BlockSpec) -> int:
        """Return how many units the head of a block has, d_k above."""
        span = spec.blocks - 2
        gone = self.pyramid * spec.index / span if span > 0 else 0.0
        return max(1, round(self.depth * (1 - gone) + gone))
