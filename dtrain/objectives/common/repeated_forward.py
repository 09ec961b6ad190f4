"""Backpropagation through layers whose derivatives a method replaces (`pfa`, `dual-propagation`).

::

    F   block 0 --y--> block 1 --y--> block 2                   no graph
    B   the forward of the block once more, with other derivatives, then its backward
        block 0 <-dx-- block 1 <-dx-- block 2

Invariant: the repeated forward computes the bits of the first one, unless the weights have changed;
only derivatives differ, so cuts change nothing that is learnt.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import ClassVar

import torch

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import (
    GRADIENT,
    ExecutionMode,
    Objective,
    backward_routes,
    forward_routes,
    loss_pair,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.actions import Route
from dtrain.tasks.task import Task


class RepeatedForward(Objective):
    """Gradients flow back from block to block, through other derivatives. The last block predicts;
    the others have no scores."""

    default_schedule: ClassVar[str] = "1f1b"
    sends_gradients_back: ClassVar[bool] = True
    recomputes: ClassVar[bool] = True

    def serves(self, task: Task) -> None:
        """Return None: every differentiable loss is served."""

    def takes_sample_weights(self) -> bool:
        """Return True."""
        return True

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward, and in training gradients (rows, ...) back."""
        backward = backward_routes(blocks) if mode == "train" else ()
        return (*forward_routes(blocks), *backward)

    @abstractmethod
    def other_derivatives(
        self, block: Block, micro_batch: MicroBatch
    ) -> AbstractContextManager[None]:
        """Return a context in which the layers of a block have the method's derivatives."""

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Repeat the forward; return the loss in the last block, elsewhere the output with its
        received gradient."""
        with torch.enable_grad(), self.other_derivatives(block, micro_batch):
            again = block.repeat_forward(micro_batch)
        micro_batch.skip_outputs = again.skip_outputs
        micro_batch.leaf_calls = again.leaf_calls
        if spec.is_last:
            return [loss_pair(micro_batch, again.y)]
        return [(again.y, micro_batch.received[GRADIENT])]
