"""tpSGD: a block's output is drawn to a fixed random target of its label; nothing comes back.

Lomnitz, Daniels, Zhang and Piacentino, "Learning with Local Gradients at the Edge", arXiv
2208.08503. With Y one-hot and P_k (C, d_k) drawn once::

    x --> block 0 --h--> block 1 --h--> block 2 --> own head, cross-entropy
             |              |
          Y P_0 - h      Y P_1 - h         residual; the slopes are those of backprop in the block

    "l2"   J_k = mean over rows and units of (Y P_k - h)^2     pulls by  -2 (Y P_k - h) / (rows d)
    "l1"   J_k = mean over rows and units of |Y P_k - h|       pulls by  -sign(Y P_k - h) / (rows d)

Unlike DRTP's force the residual vanishes at the target, so it comes to rest. The paper's J is a sum
over units; a mean is d_k times smaller, which keeps the learning rates that backprop would take
(with 64 standardised inputs the sum diverges at lr 0.1). Adam does not see the difference. Units
that are never negative cannot reach the negative half of a "uniform" target and rest at 0 for those
classes; "binary" has targets that ReLU can reach, "uniform" those of tanh.

Invariant: a target depends on the label and on the block's matrix alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch.nn.functional import l1_loss, mse_loss

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.random_feedback import FixedMatrix, MatrixKind, RandomFeedback


@final
@dataclass(frozen=True)
class TpSgd(RandomFeedback):
    """A fixed matrix of targets per earlier block; prediction: the last block's alone.

    Parameters
    ----------
    loss : str
        "l2" or "l1", whose gradient is the sign of the residual.
    feedback : str
        How the targets are drawn: see `feedback`.
    """

    loss: Literal["l2", "l1"] = "l2"
    feedback: MatrixKind = "uniform"

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the distance to the label's target; at the end the true loss."""
        if spec.is_last:
            return [scaled_loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(block.head, FixedMatrix)
        target = block.head.feedback[micro_batch.targets]  # Y P, since Y is one-hot
        distance = mse_loss if self.loss == "l2" else l1_loss
        loss = distance(micro_batch.y.flatten(1), target)
        micro_batch.loss = loss.detach()
        return [(loss, torch.full_like(loss, micro_batch.loss_scale))]
