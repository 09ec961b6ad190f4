"""DRTP: the label itself, through a fixed random matrix, stands for the error; nothing comes back.

Frenkel, Lefebvre and Bol, "Learning without feedback: fixed random learning signals allow for
feedforward training of deep neural networks", arXiv 1909.01311. With Y one-hot, h_k a block's
output and B_k (C, d_k) drawn once::

    x --> block 0 --h--> block 1 --h--> block 2 --> own head, cross-entropy
             ^              ^
           Y B_0          Y B_1           force on h; the slopes are those of backprop in the block

One layer as a block is the paper's delta_k = (Y B_k) * phi'(z_k). The force is the gradient of the
potential mean_n <h_n, (Y B_k)_n>, which is what the block's loss shows: it sinks for ever, unless
phi saturates, because no error says when to stop. All samples of a class feel the same force, so
in a linear layer the update has at most rank C.

As the authors' code has it, and not here: outputs are sigmoids under binary cross-entropy (here the
model's own head under softmax cross-entropy) and hidden units tanh; its force is not divided by the
rows of the batch while its loss is a mean, so that inner layers learn that much faster with SGD (a
force of `share` Y B / rows is born here; Adam does not see the difference).

Invariant: a block's force depends on its labels and on its matrix alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.random_feedback import FixedMatrix, MatrixKind, RandomFeedback


@final
@dataclass(frozen=True)
class Drtp(RandomFeedback):
    """A fixed matrix per earlier block; prediction: the last block's, the others have none.

    Parameters
    ----------
    feedback : str
        How the matrices are drawn: see `feedback`.
    """

    feedback: MatrixKind = "kaiming"

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Push the output along the label's row of the matrix; at the end pull the true loss."""
        if spec.is_last:
            return [scaled_loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(block.head, FixedMatrix)
        force = block.head.feedback[micro_batch.targets]  # Y B, since Y is one-hot
        micro_batch.loss = (micro_batch.y.detach().flatten(1) * force).sum(1).mean()
        return [
            (micro_batch.y, (micro_batch.loss_scale / len(force) * force).view_as(micro_batch.y))
        ]

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Say that it never stops, and that convolutions are not for it."""
        inner = specs[:-1]
        images = [str(task.index) for task in inner if len(task.output_shape) == 3]
        told = []
        if inner:
            told.append(
                f"'drtp' pushes the outputs of {len(inner)} of {len(specs)} blocks without an "
                "error that would say when to stop: use an activation that saturates (tanh), "
                "weight decay, or few epochs"
            )
        if images:
            told.append(
                f"the outputs of {len(images)} of {len(inner)} blocks that 'drtp' pushes are "
                f"images (block {', '.join(images)}): it does not train convolutions well, and its "
                "authors keep theirs random on CIFAR-10; 'local-head' trains them"
            )
        return told
