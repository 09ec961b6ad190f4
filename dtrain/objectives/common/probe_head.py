"""The last block, for objectives to which its last layer, the model's own head, is a probe.

Invariant: the head learns from what enters it and teaches nothing below it.

::

    x --> layer --> ... --> layer --features--> head --> scores
                               |                  |
                        the block's signal     the probe's loss, on detached features
"""

from __future__ import annotations

from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch


def feature_taps(block: Block) -> tuple[str, ...]:
    """Return the name of the layer before the block's last one, to be tapped; none where the
    block has one layer."""
    return tuple(block.layers)[-2:-1]


def features(block: Block, micro_batch: MicroBatch) -> Tensor:
    """Return what entered the block's last layer (rows, ...), with its graph while training."""
    return micro_batch.taps[feature_taps(block)[0]] if feature_taps(block) else micro_batch.x


def scores(block: Block, features: Tensor) -> Tensor:
    """Return the class scores (rows, classes) of the last layer alone."""
    *_, head = block.layers.values()
    made: Tensor = head(features)
    return made
