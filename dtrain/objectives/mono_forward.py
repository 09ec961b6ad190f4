"""Mono-Forward: every block's output classifies through a linear head, and nothing comes back.

Gong, Li and Abdulla, "Mono-Forward", arXiv 2501.09238. With a = the block's output, M (C, d) its
head and G = a M^T the goodness per class, the block learns softmax cross-entropy of G, delta =
(softmax(G) - Y) / rows::

    dM = delta^T a        da = delta M        both at once, and a goes on as it was before

The last block learns the true loss through the model's own head. One block is ordinary
backpropagation. Images of more than `features` numbers are averaged down to so many before M: the
paper's form for convolutions is not known to us, the limit is that of LLS.

Invariant: nothing is added to the stream, so the net that is exported is the net that was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import pooling
from dtrain.objectives.common.aux_heads import AuxHead


@dataclass(frozen=True)
class MonoForward(AuxHead):
    """A linear head without bias per earlier block.

    Parameters
    ----------
    prediction : str
        "final": the last block's; "vote": the sum of the scores of all blocks. Both are recorded
        anyway; this says which one is the model's.
    features : int
        The most numbers of an image that enter a head; flat outputs enter whole.
    """

    prediction: Literal["final", "vote"] = "final"
    features: int = 2048

    def __post_init__(self) -> None:
        pooling.check_limit(self.features)

    @property
    def predicts_by_vote(self) -> bool:
        """Whether the model's prediction is the vote."""
        return self.prediction == "vote"

    def head_network(self, spec: BlockSpec) -> nn.Module:
        """Return M as a linear map from the flattened output to the classes."""
        width = pooling.width(spec.output_shape, self.features)
        return nn.Sequential(
            pooling.make_pool(spec.output_shape, self.features),
            nn.Linear(width, spec.classes, bias=False),
        )
