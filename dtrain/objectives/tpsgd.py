"""tpSGD, target projection SGD: a block's output learns a fixed random target of its label.

Lomnitz, Daniels, Zhang and Piacentino, "Learning with Local Gradients at the Edge", arXiv
2208.08503. Nothing is sent back. With Y one-hot and P_k (C, d_k) fixed and random::

    x --> block 0 --h--> block 1 --h--> block 2 --> model's head, cross-entropy
             |              |
          Y P_0 - h      Y P_1 - h         residual, backpropagated inside the block

    "l2"   J_k = mean over rows and units of (Y P_k - h)^2     gradient -2 (Y P_k - h) / (rows d)
    "l1"   J_k = mean over rows and units of |Y P_k - h|       gradient -sign(Y P_k - h) / (rows d)

Unlike DRTP's cotangent the residual vanishes at the target, so training converges. The paper's J is
a sum over units. The mean here is d_k times smaller, which allows the learning rates of
backpropagation (with 64 standardised inputs the sum diverges at lr 0.1). Adam does not see the
difference. Units that are never negative cannot reach the negative half of a "uniform" target and
become 0 for those classes; ReLU can reach the targets of "binary", tanh those of "uniform".

Invariant: a target depends on the label and on the block's matrix alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from dtrain.block.block import BackwardPair
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.random_feedback import MatrixKind, RandomFeedback


@final
@dataclass(frozen=True)
class TpSgd(RandomFeedback):
    """A fixed matrix of targets per earlier block. The last block predicts; the others have no
    scores.

    Parameters
    ----------
    loss : str
        "l2", or "l1", whose gradient is the sign of the residual.
    feedback : str
        Distribution of the targets: see `random_matrix`.
    """

    loss: Literal["l2", "l1"] = "l2"
    feedback: MatrixKind = "uniform"

    def feedback_pair(
        self, spec: BlockSpec, micro_batch: MicroBatch, matrix: Tensor
    ) -> BackwardPair:
        """Return the distance of the output to the label's target."""
        target = matrix[micro_batch.targets]  # Y P, since Y is one-hot
        distance = mse_loss if self.loss == "l2" else l1_loss
        loss = distance(micro_batch.y.flatten(1), target)
        return scaled_loss_pair(micro_batch, loss)
