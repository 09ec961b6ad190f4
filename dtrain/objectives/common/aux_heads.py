"""Auxiliary heads: every earlier block has a classifier and a loss of its own.

::

    F   x --> block 0 --y--> block 1 --y--> block 2           nothing is sent back
                 |              |              |
    B         heads.0        heads.1       model's head       a loss of each

The last block learns the task's loss of the model's own head, so one block is ordinary
backpropagation.

Invariant: the activations are those of the model alone, so the exported model is the trained one.
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
from dtrain.objectives.base import (
    ExecutionMode,
    Objective,
    forward_routes,
    loss_pair,
    scaled_loss_pair,
    vote_routes,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import head_networks, prediction_heads
from dtrain.objectives.common.field_checks import check_hidden
from dtrain.objectives.common.head_networks import UnitKind
from dtrain.schedules.actions import Route
from dtrain.tasks.task import Task


class AuxHead(Objective):
    """A head per earlier block, each with its own loss.

    A subclass writes `build_head`, and `loss` unless it is that of the task. The last block
    predicts; the vote is the sum of the scores.
    """

    default_schedule: ClassVar[str] = "stream"

    def serves(self, task: Task) -> str | None:
        """Return None: every differentiable loss is served."""
        return None

    def takes_sample_weights(self) -> bool:
        """Whether the loss is that of the task."""
        return type(self).loss is AuxHead.loss

    @abstractmethod
    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the head of an earlier block: a module from the block's output
        (rows, *block.output_shape) to a prediction (rows, *block.scores_shape)."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Return the loss () of a head's output (rows, ...) for targets (rows, ...): a mean over
        the rows; None for the loss of the task."""
        return None

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward, and in prediction the sum of the scores so far."""
        return (*forward_routes(blocks), *vote_routes(blocks, mode))

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the loss of the head, or in the last block that of the model."""
        if spec.is_last:
            return [loss_pair(micro_batch, micro_batch.y)]
        output, targets = self.predict(spec, block, micro_batch), micro_batch.targets
        loss = self.loss(output, targets)
        if loss is None:
            loss = micro_batch.mean_loss(output)
        return [scaled_loss_pair(micro_batch, loss)]

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the prediction (rows, ...) of the head, or of the model's own."""
        return micro_batch.y if block.head is None else block.head(micro_batch.y)


@dataclass(frozen=True)
class NetworkHead(AuxHead):
    """A trained network per earlier block.

    The keys mean the same in all subclasses, so that methods can be compared with the same heads.
    Units of "auglocal", with the shapes of later layers and new weights, for 6 blocks, depth 3 and
    pyramid 0.5::

        block    0         1         2         3         4         5
        units    3         3         2         2         2      (model's head)

        d_k = max(1, round(d (1 - c r) + c r)),  r = k / (K - 2), and d with two blocks

    Parameters
    ----------
    head : str
        "greedy", "dgl", "auglocal" or "1c2f" (that of InfoPro, without its decoder); see
        `head_networks`.
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
        Of "auglocal", 0 to 1: part of the units beyond the first that the head of the last but one
        block lacks; it grows linearly with the block. With 0 all heads have `depth` units.
    unit : str
        Of "auglocal", for images: "residual" (two 3x3 convolutions and a shortcut, with a
        projection where the shape changes) or "convolution" (one of 3x3).

    Raises
    ------
    ConfigError
        `hidden`, `depth` or `pyramid` is out of range.
    """

    head: Literal["greedy", "dgl", "auglocal", "1c2f"] = "greedy"
    norm: Norm = "batch"
    groups: int = 8
    hidden: int = 3
    depth: int = 2
    pyramid: float = 0.5
    unit: UnitKind = "residual"

    def __post_init__(self) -> None:
        check_hidden(self.hidden)
        if self.depth < 1:
            raise ConfigError(
                "objective.depth-too-small",
                f"[objective] depth = {self.depth} must be at least 1; for a head without units "
                'set head = "greedy"',
            )
        if not 0 <= self.pyramid <= 1:
            raise ConfigError(
                "objective.pyramid-out-of-range",
                f"[objective] pyramid = {self.pyramid} must be between 0 (no pyramid) and 1",
            )

    @property
    def needs_downstream_layers(self) -> bool:
        """Whether heads have the shapes of later layers."""
        return self.head == "auglocal"

    @property
    def scales_to_many_blocks(self) -> bool:
        """Whether the head was published for many blocks."""
        return self.head == "auglocal"

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the network that `head` names, for the block's output; where predictions have
        positions, for each position."""
        if block.has_positions and self.head == "greedy":
            return prediction_heads.per_position(block)
        if block.has_positions:
            return prediction_heads.network_per_position(block, self._network)
        return prediction_heads.flat(block, self._network(block))

    def _network(self, spec: BlockSpec) -> nn.Module:
        match self.head:
            case "dgl":
                return head_networks.dgl(
                    spec.output_shape, spec.classes, self.norm, self.groups, self.hidden
                )
            case "1c2f":
                return head_networks.one_convolution(
                    spec.output_shape, spec.classes, self.norm, self.groups
                )
            case "auglocal":
                layers = spec.downstream_layers[:-1]  # without the model's head
                unit_shapes = head_networks.sample_shapes(
                    [layer.output_shape for layer in layers], self.unit_count(spec)
                )
                return head_networks.auglocal(
                    spec.output_shape, unit_shapes, spec.classes, self.unit, self.norm, self.groups
                )
        return head_networks.greedy(spec.output_shape, spec.classes)

    def unit_count(self, spec: BlockSpec) -> int:
        """Return the number of units of an AugLocal head: d_k above."""
        inner = spec.blocks - 2
        removed = self.pyramid * spec.index / inner if inner > 0 else 0.0
        return max(1, round(self.depth * (1 - removed) + removed))
