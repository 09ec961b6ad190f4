"""Probe head: the model's own head, trained on detached features of the last block.

::

    x --> layer --> ... --> layer --features--> head --> scores
                               |                  |
                        the block's loss       the probe's loss, on detached features

Invariant: the head learns from its input; no gradient of the probe passes below the head.
"""

from __future__ import annotations

from torch import Tensor

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import scaled_loss_pair


def feature_taps(block: Block) -> tuple[str, ...]:
    """Return the name of the layer before the block's last one, to be tapped; empty in a block of
    one layer."""
    return tuple(block.layers)[-2:-1]


def features(block: Block, micro_batch: MicroBatch) -> Tensor:
    """Return the input (rows, ...) of the block's last layer, with its graph in training."""
    return micro_batch.taps[feature_taps(block)[0]] if feature_taps(block) else micro_batch.x


def probe_pair(block: Block, micro_batch: MicroBatch, features: Tensor) -> BackwardPair:
    """Return the backward pair of the loss of the last layer alone, on `features`
    (rows, ...) that are detached.

    Records ``probe_loss``, and sets ``micro_batch.loss`` if the block has no other loss.
    """
    *_, head = block.layers.values()
    loss = micro_batch.mean_loss(head(features.detach()))
    micro_batch.metrics["probe_loss"] = loss.detach()
    return scaled_loss_pair(micro_batch, loss)
