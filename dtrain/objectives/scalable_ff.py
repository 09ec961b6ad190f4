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

from dtrain.block import Block, Pull
from dtrain.live import Given, Live
from dtrain.objectives.objective import ACTIVATION, VOTES, Mode, Objective, onward
from dtrain.objectives.parts import summit
from dtrain.objectives.parts.goodness import wide
from dtrain.objectives.task import Task
from dtrain.schedules.action import Route


@final
class Channels(nn.Module):
    """Goodness per class (rows, C) of samples of `shape`."""

    draws = False

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        image = len(shape) == 3
        width = shape[0] if image else math.prod(shape)
        self.map = nn.Conv2d(width, classes, 1) if image else nn.Linear(width, classes)

    def forward(self, input: Tensor) -> Tensor:
        """Return the mean of the squares of each channel."""
        made = self.map(input if input.dim() == 4 else input.flatten(1))
        return wide(made).square().flatten(2).mean(2) if made.dim() == 4 else wide(made).square()


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
    def votes(self) -> bool:
        """With "mean" the prediction is that of all blocks."""
        return self.prediction == "mean"

    def build(self, task: Task) -> nn.Module:
        """Return the channels of every block, the last one included."""
        return Channels(self._seen(task), task.classes)

    def helped(self, task: Task) -> tuple[int, ...]:
        """Return the shape of what has goodness."""
        return self._seen(task)

    def _seen(self, task: Task) -> tuple[int, ...]:
        return task.features if task.last else task.outputs

    def taps(self, block: Block) -> Sequence[str]:
        """Return what enters the last layer."""
        return summit.below(block)

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Activations go on; in prediction the sum of the goodness so far rides beside them."""
        return (*onward(blocks), *(onward(blocks, VOTES) if mode == "predict" else ()))

    def feed(self, task: Task, block: Block, given: Given) -> Tensor:
        """Return what arrived, normed sample by sample, or the data."""
        if ACTIVATION not in given.told:
            return super().feed(task, block, given)
        made = given.told.pop(ACTIVATION)  # what is not needed again goes
        return layer_norm(made, made.shape[1:])

    def _good(self, task: Task, block: Block, live: Live) -> Tensor:
        """Return the goodness (rows, C)."""
        assert block.helper is not None
        made: Tensor = block.helper(summit.features(block, live) if task.last else live.y)
        return made

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the loss of the goodness, and in the last block that of the probe too."""
        good = self._good(task, block, live)
        true = one_hot(live.targets, task.classes).to(good)
        positive = (good * true).sum(1)
        others = (1 - true) / (task.classes - 1)
        negative = (softplus(good - self.theta) * others).sum(1)
        loss = (softplus(self.theta - positive) + negative).mean()
        live.loss = loss.detach()
        live.figures["goodness_positive"] = positive.detach().mean()
        live.figures["goodness_negative"] = (good.detach() * others).sum(1).mean()
        pulls = [(loss, torch.full_like(loss, live.share))]
        return [*pulls, self._probed(block, live)] if task.last else pulls

    def _probed(self, block: Block, live: Live) -> Pull:
        """Return the pull of the model's head, which teaches nobody."""
        scores = summit.scores(block, summit.features(block, live).detach())
        loss = cross_entropy(scores, live.targets)
        live.figures["probe_loss"] = loss.detach()
        return loss, torch.full_like(loss, live.share)

    def predict(self, task: Task, block: Block, live: Live) -> Tensor:
        """Return the goodness (rows, C), or in the last block what the probe says."""
        if task.last and self.prediction == "probe":
            return live.y
        return self._good(task, block, live)

    def vote(self, task: Task, scores: Tensor) -> Tensor:
        """Return the block's part of the mean."""
        return scores / task.blocks
