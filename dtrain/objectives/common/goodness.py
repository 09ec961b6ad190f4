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

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import ACTIVATION, VOTES, ExecutionMode, Objective, forward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import negatives
from dtrain.objectives.common import probe_head as summit
from dtrain.schedules.actions import Route

PAIRS, CANDIDATES, SCORES = "pairs", "candidates", "scores"
"""What y is called on the way: of the widened pass in training, of the C copies in prediction, and
of the last block where block 0 asks for it."""


EPS = 1e-8
"""Added to a root mean square, as in the code of loeweX/Forward-Forward."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return numbers in float32 at least."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def rms_norm(samples: Tensor) -> Tensor:
    """Return samples (rows, ...), each divided by the root mean square of its numbers."""
    flat = at_least_float32(samples).flatten(1)
    scale = flat.square().mean(1, keepdim=True).sqrt() + EPS
    return (flat / scale).view_as(samples).to(samples.dtype)


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
    def row_groups(self) -> int:
        """Parts of the widened pass."""
        return 3

    @property
    def embeds_labels(self) -> bool:
        """Whether samples carry labels."""
        return True

    @property
    def predicts_by_vote(self) -> bool:
        """With "classes" the sum of the goodness of blocks is the prediction."""
        return self.prediction == "classes"

    @property
    def needs_downstream_layers(self) -> bool:
        """Block 0 asks whether any other block than itself has goodness."""
        return True

    # ---- what a block is made of and fed

    def model_input_shape(self, sample_shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
        """Return the shape of a sample with its label, where it carries one."""
        if not self.embeds_labels:
            return sample_shape
        image = len(sample_shape) == 3
        room = math.prod(sample_shape[1:] if image and self.label == "beside" else sample_shape)
        if room < classes and (image or self.label == "input"):
            raise ConfigError(
                "todo.key",
                f'[objective] label = "{self.label}": {classes} labels do not fit into the {room} '
                f"numbers that a sample of shape {sample_shape} has for them: set "
                + ('label = "beside"' if self.label == "input" else 'name = "scalable-ff"'),
            )
        if self.label == "input":
            return sample_shape
        return (sample_shape[0] + 1, *sample_shape[1:]) if image else (room + classes,)

    def embed_label(self, sample: Tensor, code: Tensor) -> Tensor:
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

    def neutral_samples(self, spec: BlockSpec, sample: Tensor) -> Tensor:
        """Return samples that carry 1/C for every label, or none where they carry none."""
        if not self.embeds_labels:
            return sample
        return self.embed_label(
            sample, sample.new_full((len(sample), spec.classes), 1 / spec.classes)
        )

    def training_input(self, spec: BlockSpec, micro_batch: MicroBatch, sample: Tensor) -> Tensor:
        """Return what block 0 is fed in training: [positives; negatives; neutral]."""
        pair = (micro_batch.targets, negatives.random_labels(micro_batch, spec.classes))
        told = [self.embed_label(sample, one_hot(each, spec.classes)) for each in pair]
        return torch.cat([*told, self.neutral_samples(spec, sample)])

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return what arrived at length one, or in block 0 the samples with their labels."""
        for name in (PAIRS, CANDIDATES, ACTIVATION):
            if name in micro_batch.received:
                return rms_norm(micro_batch.received.pop(name))  # what is not needed again goes
        sample = micro_batch.samples
        assert sample is not None
        if micro_batch.training:
            return self.training_input(spec, micro_batch, sample)
        if not self.predicts_by_vote:
            return self.neutral_samples(spec, sample)
        codes = torch.eye(spec.classes, device=sample.device)
        return torch.cat([self.embed_label(sample, c.expand(len(sample), -1)) for c in codes])

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return the parts of the widened pass."""
        return self.row_groups

    def taps(self, block: Block) -> Sequence[str]:
        """Return what enters the last layer."""
        return summit.feature_taps(block)

    # ---- what travels

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Return the way onward: widened in training; with the sum of scores in prediction."""
        if mode == "train":
            return forward_routes(blocks, PAIRS)
        return (
            *forward_routes(blocks, CANDIDATES if self.predicts_by_vote else ACTIVATION),
            *self._vote_routes(blocks),
        )

    def _vote_routes(self, blocks: int) -> tuple[Route, ...]:
        return forward_routes(blocks, VOTES) if self.predicts_by_vote else ()

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return y, however long and under whatever name."""
        if route.name not in (PAIRS, CANDIDATES, SCORES):
            return super().make_message(route, block, micro_batch)
        assert micro_batch is not None
        return micro_batch.y.detach()

    def message_spec(
        self, route: Route, specs: Sequence[BlockSpec], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape of y, however long."""
        many = {PAIRS: self.row_groups, CANDIDATES: specs[0].classes, SCORES: 1}.get(route.name)
        if many is None:
            return super().message_spec(route, specs, rows)
        source = specs[route.source.block]
        return (many * rows, *source.output_shape), source.dtype

    # ---- what is learnt

    def compute_goodness(self, output: Tensor) -> Tensor:
        """Return the goodness (rows,) of what leaves a block (rows, ...)."""
        squares = at_least_float32(output).flatten(1).square()
        return squares.mean(1) if self.goodness == "mean" else squares.sum(1)

    def threshold(self, output: Tensor) -> float:
        """Return the threshold of the goodness of `out` (rows, ...)."""
        return self.theta * (1 if self.goodness == "mean" else math.prod(output.shape[1:]))

    def goodness_input(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> Tensor | None:
        """Return what has goodness; None in a last block that is the model's head alone."""
        if not spec.is_last:
            return micro_batch.y
        return summit.features(block, micro_batch) if summit.feature_taps(block) else None

    def effective_goodness(
        self, spec: BlockSpec, micro_batch: MicroBatch, goodness: Tensor
    ) -> Tensor:
        """Return what is compared with the threshold, given the block's own goodness (rows,)."""
        return goodness

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the loss of the block's goodness, and in the last block that of the probe too."""
        out = self.goodness_input(spec, block, micro_batch)
        pulls = [] if out is None else self.goodness_pairs(spec, block, micro_batch, out)
        return [*pulls, self.probe_pair(block, micro_batch)] if spec.is_last else pulls

    def goodness_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch, output: Tensor
    ) -> list[BackwardPair]:
        """Return the pull of the goodness of `out`, whose first rows are positives, negatives."""
        rows = len(micro_batch.targets)
        good = self.compute_goodness(output[: 2 * rows])
        above = self.effective_goodness(spec, micro_batch, good) - self.threshold(output)
        loss = (softplus(-above[:rows]) + softplus(above[rows:])).mean()
        micro_batch.loss = loss.detach()
        micro_batch.metrics["goodness_positive"] = good[:rows].detach().mean()
        micro_batch.metrics["goodness_negative"] = good[rows:].detach().mean()
        return [(loss, torch.full_like(loss, micro_batch.loss_scale))]

    def probe_features(self, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the features (rows, ...) that the probe learns from."""
        return summit.features(block, micro_batch)[2 * len(micro_batch.targets) :]

    def probe_pair(self, block: Block, micro_batch: MicroBatch) -> BackwardPair:
        """Return the pull of the probe: cross-entropy of the model's head, which teaches nobody."""
        scores = summit.scores(block, self.probe_features(block, micro_batch).detach())
        loss = cross_entropy(scores, micro_batch.targets)
        micro_batch.metrics["probe_loss"] = loss.detach()
        micro_batch.loss = loss.detach() if micro_batch.loss is None else micro_batch.loss
        return loss, torch.full_like(loss, micro_batch.loss_scale)

    # ---- what is predicted

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor | None:
        """Return the goodness with each label (rows, C), or what the probe says."""
        if not self.predicts_by_vote:
            return micro_batch.y if spec.is_last else None
        out = self.goodness_input(spec, block, micro_batch)
        return None if out is None else self.compute_goodness(out).view(spec.classes, -1).T

    def vote(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Leave out the first block, unless it is to count, or the only other is the head alone."""
        others = spec.blocks - 1 - (spec.blocks == 2 and len(spec.downstream_layers) == 1)
        left_out = spec.index == 0 and others and not self.first
        return torch.zeros_like(scores) if left_out else scores

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of convolutions, in which labels vanish."""
        if not self.embeds_labels or not any(len(task.output_shape) == 3 for task in specs):
            return []
        count, room = specs[0].classes, math.prod(specs[0].input_shape)
        return [
            f"labels vanish in convolutions: {count} of the {room} numbers of a sample tell them, "
            "and blocks may learn next to nothing; 'scalable-ff' needs no labels in the sample"
        ]
