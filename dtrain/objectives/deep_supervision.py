"""Deep supervision: backpropagation, and the loss of an auxiliary head in every earlier block.

Lee, Xie, Gallagher, Zhang and Tu, "Deeply-supervised nets", arXiv 1409.5185. It is the baseline of
local objectives: the heads and losses are the same, but gradients are sent back, so that a block
also learns from all later blocks::

    F   x --> block 0 --y--> block 1 --y--> block 2 -> loss
                 |              |
    B         w heads.0      w heads.1
              block 0 <-dx-- block 1 <-dx-- block 2

The paper drops the loss of a head once it is small; here its weight is constant.

Invariant: with any number of blocks the gradients are those of ``loss + weight x (sum of the heads'
losses)`` over the whole model in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import GRADIENT, ExecutionMode, backward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.aux_heads import NetworkHead
from dtrain.schedules.actions import Route


@final
@dataclass(frozen=True)
class DeepSupervision(NetworkHead):
    """Auxiliary heads whose gradients reach earlier blocks. The last block predicts; the vote is
    the sum of the scores.

    Parameters
    ----------
    weight : float
        Weight of the heads' losses in the total loss, above 0.

    Raises
    ------
    ConfigError
        `weight` is not above 0.
    """

    default_schedule: ClassVar[str] = "1f1b"
    sends_gradients_back: ClassVar[bool] = True

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise ConfigError(
                "objective.weight-not-positive",
                f"[objective] weight = {self.weight} must be above 0; for no heads set "
                'name = "backprop"',
            )

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward; in training gradients (rows, ...) back."""
        backward = backward_routes(blocks) if mode == "train" else ()
        return (*super().routes(blocks, mode), *backward)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the weighted loss of the head, and the output with its received gradient."""
        [(loss, factor)] = super().backward_pairs(spec, block, micro_batch)
        if spec.is_last:
            return [(loss, factor)]
        return [(loss, self.weight * factor), (micro_batch.y, micro_batch.received[GRADIENT])]
