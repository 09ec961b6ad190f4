"""Scalable forward-forward: in every block the goodness of C channels tells the class.

Krutsylo, arXiv 2501.03176. With a 1x1 convolution A to C channels (a linear map where outputs are
not images; both with bias) the goodness of class c is the mean over pixels of the square of channel
c. The true class is the positive, all others are negatives; one pass, no label in the sample::

    (c, H, W) -- A --> (C, H, W) -- squares, mean over pixels --> g (C,)

    loss = softplus(theta - g_y) + mean_{c != y} softplus(g_c - theta)

*The loss is our reading*: the paper's exact expression, and its threshold, are unverified.

::

    F   x --> block 0 --y--> norm, block 1 --y--> norm, block 2 without head --features--> head
    B           | g                | g                              | g                 (a probe)

The input of a block is normalised over all numbers of a sample (LayerNorm without parameters). The
last block also learns by goodness, of the input of the model's head; the head is a probe.

Invariant: no gradient crosses the border of a block, and none of the probe passes below the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor, nn
from torch.nn.functional import layer_norm, one_hot, softplus

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import (
    ACTIVATION,
    ExecutionMode,
    Objective,
    forward_routes,
    scaled_loss_pair,
    vote_routes,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import probe_head
from dtrain.objectives.common.goodness import at_least_float32
from dtrain.schedules.actions import Route


@final
@dataclass(frozen=True)
class ScalableFf(Objective):
    """Goodness per class in every block.

    Parameters
    ----------
    theta : float
        Threshold of the goodness of a class.
    prediction : str
        "mean" of the goodness of all blocks, that of the "last" one, or the "probe".
    """

    theta: float = 1.0
    prediction: Literal["mean", "last", "probe"] = "mean"

    @property
    def predicts_by_vote(self) -> bool:
        """Whether the model predicts by the goodness of all blocks: with "mean"."""
        return self.prediction == "mean"

    def has_head(self, spec: BlockSpec) -> bool:
        """True: the last block has goodness, too."""
        return True

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the map to the channels."""
        return ChannelGoodness(self.head_input_shape(block), block.classes)

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...]:
        """Return the shape of the block's output, in the last block that of the features."""
        return spec.feature_shape if spec.is_last else spec.output_shape

    def taps(self, block: Block) -> Sequence[str]:
        """Tap the input of the last layer."""
        return probe_head.feature_taps(block)

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward, and in prediction the sum of the goodness so far."""
        return (*forward_routes(blocks), *vote_routes(blocks, mode))

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the received activation, normalised sample by sample, or the samples."""
        if ACTIVATION not in micro_batch.received:
            return super().make_input(spec, block, micro_batch)
        activation = micro_batch.received.pop(ACTIVATION)  # frees it: it is not read again
        return layer_norm(activation, activation.shape[1:])

    def _goodness(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the goodness (rows, C)."""
        assert block.head is not None
        goodness: Tensor = block.head(
            probe_head.features(block, micro_batch) if spec.is_last else micro_batch.y
        )
        return goodness

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the loss of the goodness, and in the last block that of the probe."""
        goodness = self._goodness(spec, block, micro_batch)
        labels = one_hot(micro_batch.targets, spec.classes).to(goodness)
        positive = (goodness * labels).sum(1)
        others = (1 - labels) / (spec.classes - 1)
        negative = (softplus(goodness - self.theta) * others).sum(1)
        loss = (softplus(self.theta - positive) + negative).mean()
        micro_batch.metrics["goodness_positive"] = positive.detach().mean()
        micro_batch.metrics["goodness_negative"] = (goodness.detach() * others).sum(1).mean()
        pairs = [scaled_loss_pair(micro_batch, loss)]
        if not spec.is_last:
            return pairs
        features = probe_head.features(block, micro_batch)
        return [*pairs, probe_head.probe_pair(block, micro_batch, features)]

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the goodness (rows, C), or in the last block the scores of the probe."""
        if spec.is_last and self.prediction == "probe":
            return micro_batch.y
        return self._goodness(spec, block, micro_batch)

    def vote(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return the block's part (rows, C) of the mean."""
        return scores / spec.blocks


@final
class ChannelGoodness(nn.Module):
    """Goodness per class (rows, C) of samples (rows, *shape)."""

    uses_rng = False

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        image = len(shape) == 3
        width = shape[0] if image else math.prod(shape)
        self.map = nn.Conv2d(width, classes, 1) if image else nn.Linear(width, classes)

    def forward(self, input: Tensor) -> Tensor:
        """Return the square of each channel, for images its mean over the pixels."""
        channels = self.map(input if input.dim() == 4 else input.flatten(1))
        squares = at_least_float32(channels).square()
        return squares.flatten(2).mean(2) if channels.dim() == 4 else squares
