"""DRTP, direct random target projection: the label replaces the error; nothing is sent back.

Frenkel, Lefebvre and Bol, "Learning without feedback: fixed random learning signals allow for
feedforward training of deep neural networks", arXiv 1909.01311. With Y one-hot, h_k a block's
output and B_k (C, d_k) fixed and random::

    x --> block 0 --h--> block 1 --h--> block 2 --> model's head, cross-entropy
             ^              ^
           Y B_0          Y B_1           cotangent of h, backpropagated inside the block

With one layer as a block this is the paper's delta_k = (Y B_k) * phi'(z_k). The cotangent is the
gradient of the potential mean_n <h_n, (Y B_k)_n>, which is recorded as the block's loss. It
decreases without end unless phi saturates, because there is no error term. All samples of a class
have the same cotangent, so the update of a linear layer has at most rank C.

The authors' code differs: its outputs are sigmoids under binary cross-entropy (here the model's own
head under softmax cross-entropy) and its hidden units tanh. It does not divide the cotangent by the
rows of the batch while its loss is a mean, so inner layers learn that much faster with SGD; here
the cotangent is ``loss_scale`` Y B / rows. Adam does not see the difference.

Invariant: a block's cotangent depends on its labels and on its matrix alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dtrain.block.block import BackwardPair
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.random_feedback import (
    MatrixKind,
    RandomFeedback,
    convolution_warnings,
)


@final
@dataclass(frozen=True)
class Drtp(RandomFeedback):
    """A fixed matrix per earlier block. The last block predicts; the others have no scores.

    Parameters
    ----------
    feedback : str
        Distribution of the matrices: see `random_matrix`.
    """

    feedback: MatrixKind = "kaiming"

    def feedback_pair(
        self, spec: BlockSpec, micro_batch: MicroBatch, matrix: Tensor
    ) -> BackwardPair:
        """Return the output with the label's row of the matrix as cotangent."""
        rows = matrix[micro_batch.targets]  # Y B, since Y is one-hot
        micro_batch.loss = (micro_batch.y.detach().flatten(1) * rows).sum(1).mean()
        return micro_batch.y, (micro_batch.loss_scale / len(rows) * rows).view_as(micro_batch.y)

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn that training does not converge by itself, and of convolutions."""
        earlier = len(specs) - 1
        if not earlier:
            return []
        return [
            f"'drtp' trains {earlier} of {len(specs)} blocks without an error term, so their "
            "outputs grow without end; use an activation that saturates (tanh), weight decay, or "
            "few epochs",
            *convolution_warnings(
                "drtp",
                specs,
                "DRTP does not train convolutions well, and its authors keep theirs random on "
                "CIFAR-10",
            ),
        ]
