"""Goodness (forward-forward): labels in the samples, positives and negatives in one wide pass.

The goodness g of a sample in a block is the mean (or the sum) of the squares of the block's output.
With a threshold theta a sample is taken to be real with probability sigma(g - theta). With g+ of a
sample that carries its label and g- of one that carries a wrong label::

    loss = softplus(theta - g+) + softplus(g- - theta)        Hinton, arXiv 2212.13345, section 2

One pass has three times the rows of the micro-batch, so one message goes to each next block::

    rows    [ right label | wrong label | neutral: 1/C each ]
    block 0   --y-->  block 1   --y-->  block 2 without head   -- features -->  head
    learns  g+ | g-   learns  g+ | g-   learns  g+ | g-                         probe, neutral rows

A received activation is divided by its root mean square, sample by sample, so that the length of
the vector does not reveal the goodness in the block before. The last block computes its goodness
from the input of the model's head; the head is a probe. A last block that consists of the head
alone has only the probe.

Prediction "classes": one pass of C copies of each sample, one per label; their goodness is summed
over the blocks. "probe": the head, with the neutral label.

Invariant: goodness is computed in float32 or float64 (a sum of 1,000 squares overflows float16),
and no gradient of the probe passes below the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import (
    ACTIVATION,
    ExecutionMode,
    MessageSpec,
    Objective,
    forward_routes,
    scaled_loss_pair,
    vote_routes,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import negatives, probe_head
from dtrain.schedules.actions import Route

PAIRS, CANDIDATES, SCORES = "pairs", "candidates", "scores"
"""Route names of y: of the wide pass in training, of the C copies in prediction, and of the last
block's scores where block 0 needs them."""


EPS = 1e-8
"""Added to a root mean square, as in the code of loeweX/Forward-Forward."""


@dataclass(frozen=True)
class Goodness(Objective):
    """Base of objectives whose blocks separate samples with a right label from samples with a wrong
    one by their goodness.

    Parameters
    ----------
    label : str
        Where samples carry the label. "input": one-hot in place of the first C numbers of the
        flattened sample. "beside": C more features, or for images one more channel.
    theta : float
        Threshold per number: that of a sum of d squares is theta d.
    goodness : str
        "mean" or "sum" of the squares; with "sum" the slope of the loss is d times as steep.
    prediction : str
        "classes" or "probe".
    first : bool
        Whether the goodness of the first block counts in the prediction; it does if no other block
        has any.
    """

    label: Literal["input", "beside"] = "input"
    theta: float = 1.0
    goodness: Literal["mean", "sum"] = "mean"
    prediction: Literal["classes", "probe"] = "classes"
    first: bool = False

    @property
    def row_groups(self) -> int:
        """Number of groups of rows in the wide pass."""
        return 3

    @property
    def embeds_labels(self) -> bool:
        """Whether samples carry labels."""
        return True

    @property
    def predicts_by_vote(self) -> bool:
        """Whether the model predicts by the goodness of all blocks: with "classes"."""
        return self.prediction == "classes"

    @property
    def needs_downstream_layers(self) -> bool:
        """True: `vote` checks whether another block than the first has goodness."""
        return True

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of convolutions, in which labels vanish."""
        if not self.embeds_labels or not any(len(spec.output_shape) == 3 for spec in specs):
            return []
        classes, numbers = specs[0].classes, math.prod(specs[0].input_shape)
        return [
            f"labels are {classes} of the {numbers} numbers of a sample and vanish in "
            "convolutions, so blocks may learn next to nothing; 'scalable-ff' needs no labels in "
            "the sample"
        ]

    # ---- the input of a block

    def model_input_shape(self, sample_shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
        """Return the shape of a sample with its label.

        Raises
        ------
        ConfigError
            The sample has less than C numbers for the label.
        """
        if not self.embeds_labels:
            return sample_shape
        image = len(sample_shape) == 3
        room = math.prod(sample_shape[1:] if image and self.label == "beside" else sample_shape)
        if room < classes and (image or self.label == "input"):
            remedy = 'label = "beside"' if self.label == "input" else 'name = "scalable-ff"'
            raise ConfigError(
                "objective.label-too-large",
                f'[objective] label = "{self.label}": {classes} labels do not fit into the {room} '
                f"numbers for them in a sample of shape {sample_shape}; set {remedy}",
            )
        if self.label == "input":
            return sample_shape
        return (sample_shape[0] + 1, *sample_shape[1:]) if image else (room + classes,)

    def embed_label(self, samples: Tensor, code: Tensor) -> Tensor:
        """Return samples (rows, ...) that carry `code` (rows, C)."""
        rows, classes = code.shape
        code = code.to(samples)
        if self.label == "input":
            return torch.cat([code, samples.flatten(1)[:, classes:]], 1).view_as(samples)
        if samples.dim() != 4:
            return torch.cat([samples.flatten(1), code], 1)
        channel = samples.new_zeros(rows, math.prod(samples.shape[2:]))
        channel[:, :classes] = code
        return torch.cat([samples, channel.view(rows, 1, *samples.shape[2:])], 1)

    def neutral_samples(self, spec: BlockSpec, samples: Tensor) -> Tensor:
        """Return samples (rows, ...) that carry 1/C for every label; unchanged if they carry no
        labels."""
        if not self.embeds_labels:
            return samples
        return self.embed_label(
            samples, samples.new_full((len(samples), spec.classes), 1 / spec.classes)
        )

    def training_input(self, spec: BlockSpec, micro_batch: MicroBatch, sample: Tensor) -> Tensor:
        """Return the input of block 0 in training: [positives; negatives; neutral]."""
        labels = (micro_batch.targets, negatives.random_labels(micro_batch, spec.classes))
        pairs = [self.embed_label(sample, one_hot(label, spec.classes)) for label in labels]
        return torch.cat([*pairs, self.neutral_samples(spec, sample)])

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the received activation at root mean square 1, or in block 0 the samples with
        labels."""
        for name in (PAIRS, CANDIDATES, ACTIVATION):
            if name in micro_batch.received:
                return rms_norm(micro_batch.received.pop(name))  # frees it: it is not read again
        samples = micro_batch.samples
        assert samples is not None
        if micro_batch.training:
            return self.training_input(spec, micro_batch, samples)
        if not self.predicts_by_vote:
            return self.neutral_samples(spec, samples)
        codes = torch.eye(spec.classes, device=samples.device)
        return torch.cat([self.embed_label(samples, c.expand(len(samples), -1)) for c in codes])

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return the number of row groups: a sample passes once in each."""
        return self.row_groups

    def taps(self, block: Block) -> Sequence[str]:
        """Tap the input of the last layer."""
        return probe_head.feature_taps(block)

    # ---- messages

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send y forward: of the wide pass in training, with the votes in prediction."""
        if mode == "train":
            return forward_routes(blocks, PAIRS)
        if not self.predicts_by_vote:
            return forward_routes(blocks)
        return (*forward_routes(blocks, CANDIDATES), *vote_routes(blocks, mode))

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return y for all names of this class."""
        if route.name not in (PAIRS, CANDIDATES, SCORES):
            return super().make_message(route, block, micro_batch)
        assert micro_batch is not None
        return micro_batch.y.detach()

    def message_spec(self, route: Route, specs: Sequence[BlockSpec], rows: int) -> MessageSpec:
        """Return the shape of y, whose rows are a multiple of `rows`."""
        groups = {PAIRS: self.row_groups, CANDIDATES: specs[0].classes, SCORES: 1}.get(route.name)
        if groups is None:
            return super().message_spec(route, specs, rows)
        source = specs[route.source.block]
        return (groups * rows, *source.output_shape), source.dtype

    # ---- training

    def compute_goodness(self, output: Tensor) -> Tensor:
        """Return the goodness (rows,) of an output (rows, ...)."""
        squares = at_least_float32(output).flatten(1).square()
        return squares.mean(1) if self.goodness == "mean" else squares.sum(1)

    def threshold(self, output: Tensor) -> float:
        """Return the threshold for the goodness of an output (rows, ...)."""
        return self.theta * (1 if self.goodness == "mean" else math.prod(output.shape[1:]))

    def goodness_input(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> Tensor | None:
        """Return the tensor (rows, ...) whose goodness is computed; None in a last block that is
        the model's head alone."""
        if not spec.is_last:
            return micro_batch.y
        return probe_head.features(block, micro_batch) if probe_head.feature_taps(block) else None

    def effective_goodness(
        self, spec: BlockSpec, micro_batch: MicroBatch, goodness: Tensor
    ) -> Tensor:
        """Return the goodness (rows,) to compare with the threshold, given the block's own."""
        return goodness

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the loss of the block's goodness, and in the last block that of the probe."""
        output = self.goodness_input(spec, block, micro_batch)
        pairs = [] if output is None else self.goodness_pairs(spec, block, micro_batch, output)
        if not spec.is_last:
            return pairs
        features = self.probe_features(block, micro_batch)
        return [*pairs, probe_head.probe_pair(block, micro_batch, features)]

    def goodness_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch, output: Tensor
    ) -> list[BackwardPair]:
        """Return the loss of the goodness of `output` (rows, ...), in which positives come first
        and then negatives."""
        rows = len(micro_batch.targets)
        goodness = self.compute_goodness(output[: 2 * rows])
        margin = self.effective_goodness(spec, micro_batch, goodness) - self.threshold(output)
        loss = (softplus(-margin[:rows]) + softplus(margin[rows:])).mean()
        micro_batch.metrics["goodness_positive"] = goodness[:rows].detach().mean()
        micro_batch.metrics["goodness_negative"] = goodness[rows:].detach().mean()
        return [scaled_loss_pair(micro_batch, loss)]

    def probe_features(self, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the features (rows, ...) of the neutral samples, from which the probe learns."""
        return probe_head.features(block, micro_batch)[2 * len(micro_batch.targets) :]

    # ---- prediction

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor | None:
        """Return the goodness with each label (rows, C), or the scores of the probe."""
        if not self.predicts_by_vote:
            return micro_batch.y if spec.is_last else None
        output = self.goodness_input(spec, block, micro_batch)
        return None if output is None else self.compute_goodness(output).view(spec.classes, -1).T

    def vote(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return the scores (rows, C); zeros for the first block, unless `first` or no other block
        has goodness."""
        others = spec.blocks - 1 - (spec.blocks == 2 and len(spec.downstream_layers) == 1)
        excluded = spec.index == 0 and others and not self.first
        return torch.zeros_like(scores) if excluded else scores


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 if it is so, else in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def rms_norm(samples: Tensor) -> Tensor:
    """Return samples (rows, ...), each divided by the root mean square of its numbers."""
    flat = at_least_float32(samples).flatten(1)
    scale = flat.square().mean(1, keepdim=True).sqrt() + EPS
    return (flat / scale).view_as(samples).to(samples.dtype)
