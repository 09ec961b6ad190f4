"""Forward-forward: each block tells samples with the right label from samples with a wrong one.

Hinton, arXiv 2212.13345; code read: loeweX/Forward-Forward, facebookresearch/forwardgnn. Goodness,
labels in the sample, the loss, the probe and prediction: see `goodness`. Negatives:

"random"   a wrong label, all others being as likely.
"hard"     a wrong label in proportion to the probe's present class probabilities::

    pass 0  F   neutral --> block 0 --> block 1 --> block 2 = probe -- scores --.
    pass 1  F   block 0 [positives; negatives] <--------------------------------'
                        `--> block 1 --> block 2

           Under "pipelined" nobody waits, and the probe learns on features some updates old;
           "drained" is the synchronous form.
"hybrid"   no labels: positives are the samples, negatives mix a sample with the next one of its
           micro-batch by a smooth random mask (from memory of the paper). Only the probe predicts.

Quirks of the code of loeweX: goodness is a sum of squares, theta = d (`goodness` = "sum", whose
slope is d times that of "mean"); samples are normed on entry too (here between blocks only); peer
normalisation (`peer`, see `peers` for what differs); the gradient of ReLU is passed straight
through, also where it is off. The last would need other layers than the model's and *is not
offered*: so nothing wakes a unit that is off for every sample. ForwardGNN trains on sums and
predicts with means, which is another order of classes than "sum" only where widths differ.

Invariant: what is drawn is the sample's, whatever the cut into micro-batches and replicas.
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
from dtrain.objectives.common import negatives
from dtrain.objectives.common import probe_head as summit
from dtrain.objectives.common.goodness import PAIRS, SCORES, Goodness
from dtrain.schedules.actions import Point, Route


@final
@dataclass(frozen=True)
class ForwardForward(Goodness):
    """Goodness of positives above a threshold, of negatives below it, in every block by itself.

    Parameters
    ----------
    negatives : "random", "hard" or "hybrid"
    peer : float
        Coefficient of peer normalisation; 0 is none.
    """

    negatives: Literal["random", "hard", "hybrid"] = "random"
    peer: float = 0.03
    accumulated_buffers: ClassVar[tuple[str, ...]] = ("recent",)

    def __post_init__(self) -> None:
        if self.negatives == "hybrid" and self.prediction == "classes":
            raise ConfigError(
                "todo.key",
                '[objective] negatives = "hybrid" learns without labels, so no goodness tells one: '
                'set prediction = "probe"',
            )

    @property
    def default_schedule(self) -> str:
        """Nothing comes back to block 0 but the scores of hard negatives; they do not block."""
        return "pipelined" if self.negatives == "hard" else "stream"

    @property
    def embeds_labels(self) -> bool:
        """Mixed samples need none."""
        return self.negatives != "hybrid"

    @property
    def row_groups(self) -> int:
        """Neutral samples have a pass of their own, or are the positives."""
        return 3 if self.negatives == "random" else 2

    def build_head(self, spec: BlockSpec) -> PeerNormalisation | None:
        """Return the mean activities of the units."""
        return (
            PeerNormalisation(spec.feature_shape if spec.is_last else spec.output_shape)
            if self.peer
            else None
        )

    def head_input_shape(self, spec: BlockSpec) -> None:
        """It is not run."""

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return how often a sample passes the block, the neutral pass included."""
        return 2 if self.negatives == "hybrid" else 3

    def couples_samples(self, spec: BlockSpec) -> bool:
        """Mixed samples depend on each other."""
        return self.negatives == "hybrid" and spec.index == 0

    def needs_graph(self, spec: BlockSpec, pass_: int) -> bool:
        """The neutral pass is for the probe, which learns on detached features."""
        return self.negatives != "hard" or pass_ == 1

    def training_input(self, spec: BlockSpec, micro_batch: MicroBatch, sample: Tensor) -> Tensor:
        """Return [positives; negatives; neutral], the last not where they come apart."""
        if self.negatives == "hybrid":
            return torch.cat([sample, negatives.mixed_samples(micro_batch, sample)])
        if self.negatives == "random":
            return super().training_input(spec, micro_batch, sample)
        if not micro_batch.pass_:
            return self.neutral_samples(spec, sample)
        pair = (
            micro_batch.targets,
            negatives.hard_labels(micro_batch, micro_batch.received[SCORES]),
        )
        return torch.cat([self.embed_label(sample, one_hot(each, spec.classes)) for each in pair])

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Return the way onward; with hard negatives after a pass that asks for scores."""
        if mode == "predict" or self.negatives != "hard":
            return super().routes(blocks, mode)
        asked = Route(Point(blocks - 1, "F"), Point(0, "F", 1), SCORES)
        return (*forward_routes(blocks), *forward_routes(blocks, PAIRS, 1), asked)

    def goodness_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch, output: Tensor
    ) -> list[BackwardPair]:
        """Add the force of peer normalisation to that of the goodness."""
        pulls = super().goodness_pairs(spec, block, micro_batch, output)
        if isinstance(block.head, PeerNormalisation):
            positives = output[: len(micro_batch.targets)]
            block.head.accumulate(positives, micro_batch.row_random.total_rows)
            pulls.append(
                (positives, self.peer * micro_batch.loss_scale * block.head.cotangent(positives))
            )
        return pulls

    def probe_features(self, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return features of neutral samples: the last rows, a pass before, or the positives."""
        if self.negatives == "random":
            return super().probe_features(block, micro_batch)
        asked = micro_batch.previous_pass if self.negatives == "hard" else micro_batch
        assert asked is not None
        return summit.features(block, asked)[: len(micro_batch.targets)]

    def after_update(self, spec: BlockSpec, block: Block, received: Mapping[str, Tensor]) -> None:
        """Let the mean activities grow older."""
        if isinstance(block.head, PeerNormalisation):
            block.head.apply_decay()

    def solve(self, spec: BlockSpec, block: Block) -> None:
        """Bring the mean activities up to date."""
        if isinstance(block.head, PeerNormalisation):
            block.head.finish_segment()


MOMENTUM = 0.9


@final
class PeerNormalisation(nn.Module):
    """Running mean activities of the units of a block whose samples have `shape`; no forward."""

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
        """Add the activity of positives (n, ...), of `rows` in the whole update."""
        activity = positives.detach().view(len(positives), len(self.mean), -1).mean(2).sum(0)
        self.recent.add_(activity.to(self.recent), alpha=(1 - MOMENTUM) / MOMENTUM / update_rows)

    def cotangent(self, positives: Tensor) -> Tensor:
        """Return d(penalty)/d(out) for positives (n, ...), for a mean over n and coefficient 1."""
        units, numbers = len(self.mean), math.prod(positives.shape[1:])
        gap = 2 * (1 - MOMENTUM) / units * (self.mean - self.mean.mean())
        spread = gap.repeat_interleave(numbers // units) * (units / numbers / len(positives))
        return spread.view(1, *positives.shape[1:]).expand_as(positives).to(positives.dtype)

    def apply_decay(self) -> None:
        """Follow an update."""
        self.recent.mul_(MOMENTUM)
        self.decay.mul_(MOMENTUM)

    def finish_segment(self) -> None:
        """End a segment."""
        self.mean.mul_(self.decay).add_(self.recent)
        self.recent.zero_()
        self.decay.fill_(1.0)
