"""What objectives share that learn by goodness: labels in the samples, one widened pass.

The goodness of a sample in a block is the mean (or the sum) of the squares of what leaves it. With
a threshold theta a sample is taken to be real with probability sigma(goodness - theta), so with g+
of a sample that carries its label and g- of one that carries a wrong one

    loss = softplus(theta - g+) + softplus(g- - theta)        Hinton, arXiv 2212.13345, section 2

One pass is three times as long as the micro-batch, so one message goes to each next block::

    rows    [ right label | wrong label | neutral: 1/C each ]
    block 0   --y-->  block 1   --y-->  block 2 without head   -- features -->  head
    learns  g+ | g-   learns  g+ | g-   learns  g+ | g-                         probe, neutral rows

What arrives is divided by its root mean square, sample by sample, so that no block reads in the
length of a vector how good the one before it found it. The last block's goodness is that of what
enters the model's head; the head is a probe. A last block that is the head alone has only that.

Prediction "classes": one pass of C copies of each sample, one per label, whose goodness is summed
over the blocks. "probe": the head, neutral label.

Invariant: goodness is computed in float32 at least (a sum of 1,000 squares overflows float16), and
no gradient of the probe passes below the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softplus

from dtrain.block import Block, Pull
from dtrain.errors import Refusal
from dtrain.live import Given, Live
from dtrain.objectives.objective import ACTIVATION, VOTES, Mode, Objective, onward
from dtrain.objectives.parts import negatives, summit
from dtrain.objectives.task import Task
from dtrain.schedules.action import Route

PAIRS, CANDIDATES, SCORES = "pairs", "candidates", "scores"
"""What y is called on the way: of the widened pass in training, of the C copies in prediction, and
of the last block where block 0 asks for it."""

TINY = 1e-8
"""Added to a root mean square, as in the code of loeweX/Forward-Forward."""


def wide(made: Tensor) -> Tensor:
    """Return numbers in float32 at least."""
    return made if made.dtype in (torch.float32, torch.float64) else made.float()


def normed(made: Tensor) -> Tensor:
    """Return samples (rows, ...), each divided by the root mean square of its numbers."""
    flat = wide(made).flatten(1)
    scale = flat.square().mean(1, keepdim=True).sqrt() + TINY
    return (flat / scale).view_as(made).to(made.dtype)


@dataclass(frozen=True)
class Goodness(Objective):
    """Blocks that tell samples with a right label from samples with a wrong one.

    Parameters
    ----------
    label : str
        "input": the one-hot label replaces the first C numbers of the flattened sample. "beside":
        it stands beside it: C features more, or for images one channel more.
    theta : float
        Threshold, for one number: of a sum of d squares it is theta d.
    goodness : str
        "mean" or "sum" of squares; the slope of the loss is d times as steep with "sum".
    prediction : str
        "classes" or "probe".
    first : bool
        Whether the goodness of the first block counts in the sum; it does where no other has any.
    """

    label: Literal["input", "beside"] = "input"
    theta: float = 1.0
    goodness: Literal["mean", "sum"] = "mean"
    prediction: Literal["classes", "probe"] = "classes"
    first: bool = False

    @property
    def parts(self) -> int:
        """Parts of the widened pass."""
        return 3

    @property
    def labels(self) -> bool:
        """Whether samples carry labels."""
        return True

    @property
    def votes(self) -> bool:
        """With "classes" the sum of the goodness of blocks is the prediction."""
        return self.prediction == "classes"

    @property
    def ahead(self) -> bool:
        """Block 0 asks whether any other block than itself has goodness."""
        return True

    # ---- what a block is made of and fed

    def sees(self, shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
        """Return the shape of a sample with its label, where it carries one."""
        if not self.labels:
            return shape
        image = len(shape) == 3
        room = math.prod(shape[1:] if image and self.label == "beside" else shape)
        if room < classes and (image or self.label == "input"):
            raise Refusal(
                f'[objective] label = "{self.label}": {classes} labels do not fit into the {room} '
                f"numbers that a sample of shape {shape} has for them: set "
                + ('label = "beside"' if self.label == "input" else 'name = "scalable-ff"')
            )
        if self.label == "input":
            return shape
        return (shape[0] + 1, *shape[1:]) if image else (room + classes,)

    def marked(self, sample: Tensor, code: Tensor) -> Tensor:
        """Return samples (rows, ...) that carry `code` (rows, C)."""
        rows, classes = code.shape
        code = code.to(sample)
        if self.label == "input":
            return torch.cat([code, sample.flatten(1)[:, classes:]], 1).view_as(sample)
        if sample.dim() != 4:
            return torch.cat([sample.flatten(1), code], 1)
        channel = sample.new_zeros(rows, math.prod(sample.shape[2:]))
        channel[:, :classes] = code
        return torch.cat([sample, channel.view(rows, 1, *sample.shape[2:])], 1)

    def neutral(self, task: Task, sample: Tensor) -> Tensor:
        """Return samples that carry 1/C for every label, or none where they carry none."""
        if not self.labels:
            return sample
        return self.marked(sample, sample.new_full((len(sample), task.classes), 1 / task.classes))

    def learnt(self, task: Task, given: Given, sample: Tensor) -> Tensor:
        """Return what block 0 is fed in training: [positives; negatives; neutral]."""
        pair = (given.targets, negatives.random(given, task.classes))
        told = [self.marked(sample, one_hot(each, task.classes)) for each in pair]
        return torch.cat([*told, self.neutral(task, sample)])

    def feed(self, task: Task, block: Block, given: Given) -> Tensor:
        """Return what arrived at length one, or in block 0 the samples with their labels."""
        for name in (PAIRS, CANDIDATES, ACTIVATION):
            if name in given.told:
                return normed(given.told.pop(name))  # what is not needed again goes
        sample = given.sample
        assert sample is not None
        if given.learning:
            return self.learnt(task, given, sample)
        if not self.votes:
            return self.neutral(task, sample)
        codes = torch.eye(task.classes, device=sample.device)
        return torch.cat([self.marked(sample, c.expand(len(sample), -1)) for c in codes])

    def copies(self, task: Task) -> int:
        """Return the parts of the widened pass."""
        return self.parts

    def taps(self, block: Block) -> Sequence[str]:
        """Return what enters the last layer."""
        return summit.below(block)

    # ---- what travels

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Return the way onward: widened in training; with the sum of scores in prediction."""
        if mode == "train":
            return onward(blocks, PAIRS)
        return (*onward(blocks, CANDIDATES if self.votes else ACTIVATION), *self._voting(blocks))

    def _voting(self, blocks: int) -> tuple[Route, ...]:
        return onward(blocks, VOTES) if self.votes else ()

    def tell(self, route: Route, block: Block, live: Live | None) -> Tensor:
        """Return y, however long and under whatever name."""
        if route.name not in (PAIRS, CANDIDATES, SCORES):
            return super().tell(route, block, live)
        assert live is not None
        return live.y.detach()

    def shape(
        self, route: Route, tasks: Sequence[Task], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape of y, however long."""
        many = {PAIRS: self.parts, CANDIDATES: tasks[0].classes, SCORES: 1}.get(route.name)
        if many is None:
            return super().shape(route, tasks, rows)
        source = tasks[route.source.block]
        return (many * rows, *source.outputs), source.dtype

    # ---- what is learnt

    def good(self, out: Tensor) -> Tensor:
        """Return the goodness (rows,) of what leaves a block (rows, ...)."""
        squares = wide(out).flatten(1).square()
        return squares.mean(1) if self.goodness == "mean" else squares.sum(1)

    def level(self, out: Tensor) -> float:
        """Return the threshold of the goodness of `out` (rows, ...)."""
        return self.theta * (1 if self.goodness == "mean" else math.prod(out.shape[1:]))

    def output(self, task: Task, block: Block, live: Live) -> Tensor | None:
        """Return what has goodness; None in a last block that is the model's head alone."""
        if not task.last:
            return live.y
        return summit.features(block, live) if summit.below(block) else None

    def joined(self, task: Task, live: Live, good: Tensor) -> Tensor:
        """Return what is compared with the threshold, given the block's own goodness (rows,)."""
        return good

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the loss of the block's goodness, and in the last block that of the probe too."""
        out = self.output(task, block, live)
        pulls = [] if out is None else self.taught(task, block, live, out)
        return [*pulls, self.probed(block, live)] if task.last else pulls

    def taught(self, task: Task, block: Block, live: Live, out: Tensor) -> list[Pull]:
        """Return the pull of the goodness of `out`, whose first rows are positives, negatives."""
        rows = len(live.targets)
        good = self.good(out[: 2 * rows])
        above = self.joined(task, live, good) - self.level(out)
        loss = (softplus(-above[:rows]) + softplus(above[rows:])).mean()
        live.loss = loss.detach()
        live.figures["goodness_positive"] = good[:rows].detach().mean()
        live.figures["goodness_negative"] = good[rows:].detach().mean()
        return [(loss, torch.full_like(loss, live.share))]

    def probing(self, block: Block, live: Live) -> Tensor:
        """Return the features (rows, ...) that the probe learns from."""
        return summit.features(block, live)[2 * len(live.targets) :]

    def probed(self, block: Block, live: Live) -> Pull:
        """Return the pull of the probe: cross-entropy of the model's head, which teaches nobody."""
        scores = summit.scores(block, self.probing(block, live).detach())
        loss = cross_entropy(scores, live.targets)
        live.figures["probe_loss"] = loss.detach()
        live.loss = loss.detach() if live.loss is None else live.loss
        return loss, torch.full_like(loss, live.share)

    # ---- what is predicted

    def predict(self, task: Task, block: Block, live: Live) -> Tensor | None:
        """Return the goodness with each label (rows, C), or what the probe says."""
        if not self.votes:
            return live.y if task.last else None
        out = self.output(task, block, live)
        return None if out is None else self.good(out).view(task.classes, -1).T

    def vote(self, task: Task, scores: Tensor) -> Tensor:
        """Leave out the first block, unless it is to count, or the only other is the head alone."""
        others = task.blocks - 1 - (task.blocks == 2 and len(task.later) == 1)
        left_out = task.block == 0 and others and not self.first
        return torch.zeros_like(scores) if left_out else scores

    def cautions(self, tasks: Sequence[Task], rows: int) -> list[str]:
        """Warn of convolutions, in which labels vanish."""
        if not self.labels or not any(len(task.outputs) == 3 for task in tasks):
            return []
        count, room = tasks[0].classes, math.prod(tasks[0].inputs)
        return [
            f"labels vanish in convolutions: {count} of the {room} numbers of a sample tell them, "
            "and blocks may learn next to nothing; 'scalable-ff' needs no labels in the sample"
        ]
