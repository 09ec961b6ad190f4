"""ForwardGNN: blocks compare nodes with one virtual node per class, in a single forward pass.

Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, arXiv 2403.11004, variant SF.
Block 0 gets C rows more than the batch: virtual nodes with random, fixed features. In a graph
network virtual node c aggregates the training nodes of class c; no node aggregates from it. With
the outputs h of a node and v of the virtual nodes in earlier block b::

    scores = h v^T / temperature         loss = cross-entropy        x_{b+1} = layer_norm(sg(h))

    x, virtual --> block 0 --h, v--> block 1 --h, v--> block 2
                      |                 |                 |
                   h . v             h . v          model's head         a loss of each

The last block learns the task's loss of the model's own head, so one block is ordinary
backpropagation. The model predicts by the sum of softmax(scores) over all blocks. In a model that
is no graph network a virtual node has no neighbours: its output is that of random features.

The authors' code trains one layer after another, each until it stops early; here all blocks learn
at once.

Invariant: heads have no parameters, and nothing is sent back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import (
    ExecutionMode,
    Objective,
    forward_routes,
    loss_pair,
    vote_routes,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.field_checks import check_temperature
from dtrain.schedules.actions import Route
from dtrain.tasks.task import Task


@final
@dataclass(frozen=True)
class ForwardGnn(Objective):
    """A comparison with virtual nodes per earlier block. The vote of all blocks predicts.

    Parameters
    ----------
    temperature : float
        Divisor of the scores, above 0.

    Raises
    ------
    ConfigError
        `temperature` is out of range.
    """

    predicts_by_vote: ClassVar[bool] = True

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def serves(self, task: Task) -> str | None:
        """Return None where a sample has one class: there is a virtual node for each."""
        serves = task.has_classes and not task.has_positions
        return None if serves else "needs classes, one prediction per sample"

    def takes_sample_weights(self) -> bool:
        """Whether the loss is that of the task."""
        return True

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of virtual nodes without neighbours."""
        if specs[0].graph_nodes or len(specs) == 1:
            return []
        return [
            "the samples are no nodes of a graph, so the virtual nodes of forward-gnn have no "
            'neighbours and are random vectors; set [model] name = "gcn", or use mono-forward'
        ]

    # ---- virtual nodes

    def virtual_rows(self, spec: BlockSpec) -> int:
        """Return the number of rows behind those of the samples: one per class, if any block
        compares."""
        return spec.classes if spec.blocks > 1 else 0

    def has_head(self, spec: BlockSpec) -> bool:
        """Whether the block holds the features of the virtual nodes: block 0 does."""
        return spec.index == 0 and spec.blocks > 1

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the features of the virtual nodes.

        Raises
        ------
        ConfigError
            Samples are integers or complex numbers, or have further inputs that are no graph's.
        """
        if block.integer_samples or block.complex_samples:
            raise ConfigError(
                "objective.virtual-nodes-not-real",
                '[objective] name = "forward-gnn" adds samples of random real numbers, but those '
                "of the data are integers or complex: choose another objective",
            )
        if block.other_inputs and not block.graph_nodes:
            raise ConfigError(
                "objective.virtual-nodes-inputs",
                '[objective] name = "forward-gnn" adds samples of one input, but those of the data '
                f"have {1 + len(block.other_inputs)}: choose another objective",
            )
        return VirtualNodes(block.classes, block.sample_shape)

    def head_input_shape(self, spec: BlockSpec) -> None:
        """Return None: the head is not run on samples."""

    def message_rows(self, spec: BlockSpec, rows: int) -> int:
        """Return the rows of activations, those of the virtual nodes included."""
        return rows + self.virtual_rows(spec)

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return samples and virtual nodes in block 0, the normalised activation elsewhere."""
        x = super().make_input(spec, block, micro_batch)
        virtual = self.virtual_rows(spec)
        if virtual and spec.graph_nodes and micro_batch.other_samples:
            [nodes] = micro_batch.other_samples
            numbers = torch.arange(spec.graph_nodes, spec.graph_nodes + virtual)
            micro_batch.other_samples = (torch.cat([nodes, numbers.to(nodes)]),)
        if spec.index:
            return layer_norm(x, x.shape[1:])
        if not virtual:
            return x
        assert isinstance(block.head, VirtualNodes)
        return torch.cat([x, block.head.features.to(x)])

    # ---- training and prediction

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward, and in prediction the sum of the votes so far."""
        return (*forward_routes(blocks), *vote_routes(blocks, mode))

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the task's loss of the scores."""
        return [loss_pair(micro_batch, self.predict(spec, block, micro_batch))]

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the scores (rows, classes): h v^T / temperature, or those of the model."""
        y, rows = micro_batch.y, len(micro_batch.targets)
        if spec.is_last:
            return y[:rows]
        h, v = y[:rows].flatten(1), y[rows:].flatten(1)
        return h @ v.T / self.temperature

    def vote(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return softmax(scores)."""
        return scores.softmax(1)


@final
class VirtualNodes(nn.Module):
    """Features (classes, ...) of the virtual nodes, standard normal."""

    uses_rng = False
    identical_buffers = ("features",)
    features: Tensor

    def __init__(self, classes: int, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(classes, *sample_shape))
