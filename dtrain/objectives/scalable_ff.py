"""Scalable forward-forward: every block reads the classes from the goodness of C channels.

Krutsylo, arXiv 2501.03176. With a 1x1 convolution A to C channels (a linear map where outputs are
no images; both with bias) the goodness of class c is the mean over pixels of the square of channel
c. The true class is the positive, all others are negatives; one pass, no label in the sample::

    (c, H, W) -- A --> (C, H, W) -- squares, mean over pixels --> g (C,)

    loss = softplus(theta - g_y) + mean_{c != y} softplus(g_c - theta)

*The loss is our reading*: the paper's exact expression, and its threshold, are unverified.

::

    F   x --> block 0 --y--> norm, block 1 --y--> norm, block 2 without head --features--> head
    B           | g                | g                              | g                 (a probe)

What a block is fed is normed over all numbers of a sample (LayerNorm without parameters). The last
block learns by goodness as well, from what enters the model's head; the head is a probe.

Invariant: no gradient crosses a border of blocks, and none of the probe passes below the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, one_hot, softplus

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import ACTIVATION, VOTES, ExecutionMode, Objective, forward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import probe_head as summit
from dtrain.objectives.common.goodness import at_least_float32
from dtrain.schedules.actions import Route


@final
class ChannelGoodness(nn.Module):
    """Goodness per class (rows, C) of samples of `shape`."""

    uses_rng = False

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        image = len(shape) == 3
        width = shape[0] if image else math.prod(shape)
        self.map = nn.Conv2d(width, classes, 1) if image else nn.Linear(width, classes)

    def forward(self, input: Tensor) -> Tensor:
        """Return the mean of the squares of each channel."""
        made = self.map(input if input.dim() == 4 else input.flatten(1))
        return (
            at_least_float32(made).square().flatten(2).mean(2)
            if made.dim() == 4
            else at_least_float32(made).square()
        )


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
        """With "mean" the prediction is that of all blocks."""
        return self.prediction == "mean"

    def build_head(self, spec: BlockSpec) -> nn.Module:
        """Return the channels of every block, the last one included."""
        return ChannelGoodness(self._goodness_shape(spec), spec.classes)

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...]:
        """Return the shape of what has goodness."""
        return self._goodness_shape(spec)

    def _goodness_shape(self, spec: BlockSpec) -> tuple[int, ...]:
        return spec.feature_shape if spec.is_last else spec.output_shape

    def taps(self, block: Block) -> Sequence[str]:
        """Return what enters the last layer."""
        return summit.feature_taps(block)

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Activations go on; in prediction the sum of the goodness so far rides beside them."""
        return (
            *forward_routes(blocks),
            *(forward_routes(blocks, VOTES) if mode == "predict" else ()),
        )

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return what arrived, normed sample by sample, or the data."""
        if ACTIVATION not in micro_batch.received:
            return super().make_input(spec, block, micro_batch)
        made = micro_batch.received.pop(ACTIVATION)  # what is not needed again goes
        return layer_norm(made, made.shape[1:])

    def _goodness(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the goodness (rows, C)."""
        assert block.head is not None
        made: Tensor = block.head(
            summit.features(block, micro_batch) if spec.is_last else micro_batch.y
        )
        return made

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the loss of the goodness, and in the last block that of the probe too."""
        good = self._goodness(spec, block, micro_batch)
        true = one_hot(micro_batch.targets, spec.classes).to(good)
        positive = (good * true).sum(1)
        others = (1 - true) / (spec.classes - 1)
        negative = (softplus(good - self.theta) * others).sum(1)
        loss = (softplus(self.theta - positive) + negative).mean()
        micro_batch.loss = loss.detach()
        micro_batch.metrics["goodness_positive"] = positive.detach().mean()
        micro_batch.metrics["goodness_negative"] = (good.detach() * others).sum(1).mean()
        pulls = [(loss, torch.full_like(loss, micro_batch.loss_scale))]
        return [*pulls, self._probe_pair(block, micro_batch)] if spec.is_last else pulls

    def _probe_pair(self, block: Block, micro_batch: MicroBatch) -> BackwardPair:
        """Return the pull of the model's head, which teaches nobody."""
        scores = summit.scores(block, summit.features(block, micro_batch).detach())
        loss = cross_entropy(scores, micro_batch.targets)
        micro_batch.metrics["probe_loss"] = loss.detach()
        return loss, torch.full_like(loss, micro_batch.loss_scale)

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the goodness (rows, C), or in the last block what the probe says."""
        if spec.is_last and self.prediction == "probe":
            return micro_batch.y
        return self._goodness(spec, block, micro_batch)

    def vote(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return the block's part of the mean."""
        return scores / spec.blocks
