"""Forward-forward: each block separates samples with the right label from those with a wrong one.

Hinton, arXiv 2212.13345; code read: loeweX/Forward-Forward, facebookresearch/forwardgnn. Goodness,
labels in the sample, the loss, the probe and prediction: see `goodness`. Negatives:

"random"   a wrong label, all others equally likely.
"hard"     a wrong label in proportion to the probe's current class probabilities::

    pass 0  F   neutral --> block 0 --> block 1 --> block 2 = probe -- scores --.
    pass 1  F   block 0 [positives; negatives] <--------------------------------'
                        `--> block 1 --> block 2

           Under "pipelined" no block waits, and the probe learns on features that are some updates
           old; "drained" is the synchronous form.
"hybrid"   no labels: positives are the samples, negatives mix a sample with the next one of its
           micro-batch by a smooth random mask (the paper's method, from memory). Only the probe
           predicts.

Quirks of the code of loeweX: goodness is a sum of squares, theta = d (`goodness` = "sum", whose
slope is d times that of "mean"). Samples are normalised at the input, too (here between blocks
only). It has peer normalisation (`peer`; see `PeerNormalisation`). The gradient of ReLU is passed
straight through, also where the unit is off; that needs other layers than the model's and *is not
offered*, so a unit that is off for every sample stays off. ForwardGNN trains on sums and predicts
with means; its order of classes differs from that of "sum" only if widths differ.

Invariant: random numbers belong to the sample, whatever the cut into micro-batches and replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import ExecutionMode, forward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import negatives, probe_head
from dtrain.objectives.common.goodness import PAIRS, SCORES, Goodness
from dtrain.schedules.actions import Point, Route

MOMENTUM = 0.9
"""Momentum of the running means of peer normalisation."""


@final
@dataclass(frozen=True)
class ForwardForward(Goodness):
    """Goodness above a threshold for positives and below it for negatives, in each block alone.

    Parameters
    ----------
    negatives : "random", "hard" or "hybrid"
        How negatives are made: see above.
    peer : float
        Coefficient of peer normalisation; 0 for none.

    Raises
    ------
    ConfigError
        "hybrid" negatives with the prediction "classes".
    """

    negatives: Literal["random", "hard", "hybrid"] = "random"
    peer: float = 0.03
    accumulated_buffers: ClassVar[tuple[str, ...]] = ("recent",)

    def __post_init__(self) -> None:
        if self.negatives == "hybrid" and self.prediction == "classes":
            raise ConfigError(
                "objective.hybrid-needs-probe",
                '[objective] negatives = "hybrid" trains without labels, so goodness predicts no '
                'class: set prediction = "probe"',
            )

    @property
    def default_schedule(self) -> str:
        """Return "stream", or with hard negatives, whose scores go back to block 0, "pipelined"."""
        return "pipelined" if self.negatives == "hard" else "stream"

    @property
    def embeds_labels(self) -> bool:
        """Whether samples carry labels; mixed samples do not."""
        return self.negatives != "hybrid"

    @property
    def row_groups(self) -> int:
        """3, or 2 if neutral samples have a pass of their own ("hard") or are the positives
        ("hybrid")."""
        return 3 if self.negatives == "random" else 2

    def has_head(self, spec: BlockSpec) -> bool:
        """Whether peer normalisation is on: then every block has running means."""
        return bool(self.peer)

    def build_head(self, block: BlockSpec) -> PeerNormalisation:
        """Return the running mean activities of the units that have goodness."""
        return PeerNormalisation(block.feature_shape if block.is_last else block.output_shape)

    def head_input_shape(self, spec: BlockSpec) -> None:
        """Return None: the head has no forward."""

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return how often a sample passes through the block, the neutral pass included."""
        return 2 if self.negatives == "hybrid" else 3

    def couples_samples(self, spec: BlockSpec) -> bool:
        """Whether block 0 mixes samples."""
        return self.negatives == "hybrid" and spec.index == 0

    def needs_graph(self, spec: BlockSpec, pass_: int) -> bool:
        """Whether it is not the neutral pass of "hard", whose features are only detached input of
        the probe."""
        return self.negatives != "hard" or pass_ == 1

    def training_input(self, spec: BlockSpec, micro_batch: MicroBatch, sample: Tensor) -> Tensor:
        """Return [positives; negatives; neutral], the last only if they have no own pass."""
        if self.negatives == "hybrid":
            return torch.cat([sample, negatives.mixed_samples(micro_batch, sample)])
        if self.negatives == "random":
            return super().training_input(spec, micro_batch, sample)
        if not micro_batch.pass_:
            return self.neutral_samples(spec, sample)
        wrong = negatives.hard_labels(micro_batch, micro_batch.received[SCORES])
        labels = (micro_batch.targets, wrong)
        return torch.cat(
            [self.embed_label(sample, one_hot(label, spec.classes)) for label in labels]
        )

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send y forward; with hard negatives in two passes, and the scores of the first to block
        0."""
        if mode == "predict" or self.negatives != "hard":
            return super().routes(blocks, mode)
        scores = Route(Point(blocks - 1, "F"), Point(0, "F", 1), SCORES)
        return (*forward_routes(blocks), *forward_routes(blocks, PAIRS, 1), scores)

    def goodness_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch, output: Tensor
    ) -> list[BackwardPair]:
        """Return the loss of the goodness, and the positives with the cotangent of peer
        normalisation."""
        pairs = super().goodness_pairs(spec, block, micro_batch, output)
        if isinstance(block.head, PeerNormalisation):
            positives = output[: len(micro_batch.targets)]
            block.head.accumulate(positives, micro_batch.row_random.total_rows)
            scale = self.peer * micro_batch.loss_scale
            pairs.append((positives, scale * block.head.cotangent(positives)))
        return pairs

    def probe_features(self, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the features of neutral samples: of the last rows, of the pass before, or of the
        positives."""
        if self.negatives == "random":
            return super().probe_features(block, micro_batch)
        neutral = micro_batch.previous_pass if self.negatives == "hard" else micro_batch
        assert neutral is not None
        return probe_head.features(block, neutral)[: len(micro_batch.targets)]

    def after_update(self, spec: BlockSpec, block: Block, received: Mapping[str, Tensor]) -> None:
        """Decay the running means."""
        if isinstance(block.head, PeerNormalisation):
            block.head.apply_decay()

    def solve(self, spec: BlockSpec, block: Block) -> None:
        """Bring the running means up to date."""
        if isinstance(block.head, PeerNormalisation):
            block.head.finish_segment()


@final
class PeerNormalisation(nn.Module):
    """Running mean activities of a block's units, which a penalty draws to their common mean.

    With a_i the mean activity of unit i over the positives of an update and r <- m r + (1 - m) a
    its running mean, m = 0.9, the code of loeweX/Forward-Forward adds c * mean_i (mean(r) - r_i)^2
    to the loss. The gradient at a_i is c (1 - m) 2/d (r_i - mean(r)).

    *Here r is that of the segment's start*, where the code includes the current micro-batch: this
    gradient does not depend on the other samples, and replicas agree on it without a message. In
    the first segment it is 0, since all r_i start at 1/2. r itself is that of the code, over the
    positives of all replicas, and is brought up to date at the end of the segment::

        B   recent += (1 - m) / m * sum a / n     U   recent *= m, decay *= m
        segment's end   recent summed over replicas, mean = decay * mean + recent

    Invariant: ``decay * mean + recent`` is the running mean after the last update of a segment;
    `recent` is a sum over samples and replicas.

    Parameters
    ----------
    shape : tuple of int
        Shape of one sample of the output; the units of an image are its channels.
    """

    identical_buffers = ("mean", "recent", "decay")
    mean: Tensor
    recent: Tensor
    decay: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        units = shape[0] if len(shape) == 3 else math.prod(shape)
        self.register_buffer("mean", torch.full((units,), 0.5))
        self.register_buffer("recent", torch.zeros(units))
        self.register_buffer("decay", torch.ones(()))

    def accumulate(self, positives: Tensor, update_rows: int) -> None:
        """Add the activity of positives (n, ...) of an update with `update_rows` positives."""
        activity = positives.detach().view(len(positives), len(self.mean), -1).mean(2).sum(0)
        self.recent.add_(activity.to(self.recent), alpha=(1 - MOMENTUM) / MOMENTUM / update_rows)

    def cotangent(self, positives: Tensor) -> Tensor:
        """Return the gradient of the penalty at positives (n, ...), for a mean over n and
        coefficient 1."""
        units, numbers = len(self.mean), math.prod(positives.shape[1:])
        gap = 2 * (1 - MOMENTUM) / units * (self.mean - self.mean.mean())
        per_number = gap.repeat_interleave(numbers // units) * (units / numbers / len(positives))
        return per_number.view(1, *positives.shape[1:]).expand_as(positives).to(positives.dtype)

    def apply_decay(self) -> None:
        """Decay the sums by one update."""
        self.recent.mul_(MOMENTUM)
        self.decay.mul_(MOMENTUM)

    def finish_segment(self) -> None:
        """Merge the sums of the segment into the running mean."""
        self.mean.mul_(self.decay).add_(self.recent)
        self.recent.zero_()
        self.decay.fill_(1.0)
