"""Mono-Forward: every earlier block is classified by a linear head, and nothing is sent back.

Gong, Li and Abdulla, "Mono-Forward", arXiv 2501.09238. With a the block's output, M (C, d) its head
and G = a M^T the goodness per class, the block learns the softmax cross-entropy of G. With
delta = (softmax(G) - Y) / rows::

    dM = delta^T a        da = delta M        both in one step; the next block gets a as it was

The last block learns the cross-entropy of the model's own head, so one block is ordinary
backpropagation. Images of more than `features` numbers are averaged down to that many before M: we
do not know the paper's form for convolutions, and the limit is that of LLS.

Invariant: the activations are those of the model alone, so the exported model is the trained one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import pooling, prediction_heads
from dtrain.objectives.common.aux_heads import AuxHead


@dataclass(frozen=True)
class MonoForward(AuxHead):
    """A linear head without bias per earlier block.

    Parameters
    ----------
    prediction : str
        The model's prediction: "final", that of the last block, or "vote", the sum of the scores of
        all blocks. Both are recorded.
    features : int
        Largest number of features of an image that enter a head; flat outputs enter whole.

    Raises
    ------
    ConfigError
        `features` is below 1.
    """

    prediction: Literal["final", "vote"] = "final"
    features: int = 2048

    def __post_init__(self) -> None:
        pooling.check_limit(self.features)

    @property
    def predicts_by_vote(self) -> bool:
        """Whether the model predicts by the vote."""
        return self.prediction == "vote"

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return M: a linear map from the flattened output to the classes, or one per position."""
        if block.has_positions:
            return prediction_heads.per_position(block, bias=False)
        width = pooling.width(block.output_shape, self.features)
        network = nn.Sequential(
            pooling.make_pool(block.output_shape, self.features),
            nn.Linear(width, block.classes, bias=False),
        )
        return prediction_heads.flat(block, network)
