"""Deep supervision: backpropagation, and a local head's loss in every earlier block beside it.

Lee, Xie, Gallagher, Zhang and Tu, "Deeply-supervised nets", arXiv 1409.5185. It is the baseline
that a local objective is held against: the same heads and the same losses, but a gradient comes
back, so that what a block learns serves all blocks behind it::

    F   x --> block 0 --y--> block 1 --y--> block 2 -> loss
                 |              |
    B         w heads.0      w heads.1
              block 0 <-dx-- block 1 <-dx-- block 2

The paper drops a head's loss once it is small; here it stays, with a constant weight.

Invariant: with any number of blocks the gradients are those of ``loss + weight x (sum of the heads'
losses)`` over the whole net in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import GRADIENT, ExecutionMode, scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.aux_heads import NetworkHead
from dtrain.schedules.actions import Point, Route


@final
@dataclass(frozen=True)
class DeepSupervision(NetworkHead):
    """Local heads whose gradient goes on to earlier blocks; prediction: last block, and the vote.

    Parameters
    ----------
    weight : float
        Of the heads' losses beside the last block's.
    """

    default_schedule: ClassVar[str] = "1f1b"

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise ConfigError(
                "todo.key",
                f"[objective] weight = {self.weight}: give more than 0, or name "
                '= "backprop" for no heads',
            )

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Activations go on; in training gradients (rows, ...) come back."""
        if mode == "predict":
            return super().routes(blocks, mode)
        back = (Route(Point(b + 1, "B"), Point(b, "B"), GRADIENT) for b in range(blocks - 1))
        return (*super().routes(blocks, mode), *back)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the head's loss, and the output along what was told."""
        loss, force = scaled_loss_pair(micro_batch, self.predict(spec, block, micro_batch))
        if spec.is_last:
            return [(loss, force)]
        return [(loss, self.weight * force), (micro_batch.y, micro_batch.received[GRADIENT])]
