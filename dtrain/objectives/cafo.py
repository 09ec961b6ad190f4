"""CaFo, cascaded forward: a linear head reads every block's output; the blocks may stay random.

Zhao et al., "The cascaded forward algorithm for neural network training", arXiv 2303.09728. With h
the features of a sample, y its one-hot label and W_k the head of block k::

    x --> block 0 --h--> block 1 --h--> block 2
             |              |              |
            W_0            W_1       W_2, own head
             '--- sum of softmax(W_k h) ---'-----> class

    "least-squares"       W = (sum h h^T)^-1 sum h y^T, at the end of a segment
    "ce", "sparsemax"     W learns that loss by the run's optimizer; the latter votes by sparsemax

"random" blocks keep their initial weights: nothing runs backward. "trained" blocks learn from the
loss of their own head (with least squares: from the W of the segment before). The last linear map
of the model's own head is solved, or learns, too.

With random blocks sums grow over the epochs: the equations stay the same, or with augmentation get
more views of the samples. Trained blocks change, so their sums start anew once they contain an
epoch; a run that ends within an epoch is solved from that part of it. Before the first solution
heads have their initial weights.

The paper's trained form is said to use direct feedback alignment; the authors' code has none. Their
heads have no bias, descend over the whole training split from weights of 1, and take up to 8192
features as they are (set `features`).

Invariant: with random blocks only heads change, apart from batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import needs_labels, needs_means_over_samples, scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import pooling
from dtrain.objectives.common.aux_heads import AuxHead
from dtrain.objectives.common.least_squares import (
    Readout,
    head_features,
    last_linear,
    mean_squared_error,
    model_head_linear,
    tap_head_input,
    width_warnings,
)
from dtrain.tasks.task import Task


@final
@dataclass(frozen=True)
class Cafo(AuxHead):
    """A linear head per block. The vote of all blocks predicts.

    Parameters
    ----------
    head : str
        "least-squares", "ce" or "sparsemax".
    blocks : str
        "random" or "trained".
    features : int
        Largest number of features of an image that enter a head; flat outputs enter whole.

    Raises
    ------
    ConfigError
        `features` is below 1, or a head of the model is to be solved that is not linear.
    """

    accumulated_buffers: ClassVar[tuple[str, ...]] = ("gram", "cross")
    head: Literal["least-squares", "ce", "sparsemax"] = "least-squares"
    blocks: Literal["random", "trained"] = "random"
    features: int = 2048

    def __post_init__(self) -> None:
        pooling.check_limit(self.features)

    def serves(self, task: Task) -> str | None:
        """Return None where a prediction is flat; sums need samples that count alike."""
        if self.head == "sparsemax":
            return needs_labels(task)
        if task.has_positions:
            return "needs one prediction per sample"
        if self.closed_form and task.outputs_per_value > 1:
            return "solves for the targets themselves"
        return needs_means_over_samples(task) if self.closed_form else None

    def takes_sample_weights(self) -> bool:
        """Whether heads learn the task's loss."""
        return self.head == "ce"

    @property
    def closed_form(self) -> bool:
        """Whether heads are solved in closed form."""
        return self.head == "least-squares"

    @property
    def needs_downstream_layers(self) -> bool:
        """Whether the width of the model's head is read, for its sums."""
        return self.closed_form

    @property
    def trains_layers(self) -> bool:
        """Whether the layers learn; if not, only the model's head does."""
        return self.blocks == "trained"

    @property
    def predicts_by_vote(self) -> bool:
        """True: the paper predicts by all heads."""
        return True

    def frozen_modules(
        self, spec: BlockSpec, layers: Mapping[str, nn.Module]
    ) -> Iterable[nn.Module]:
        """Return all random layers except a model's head that learns, and the linear map that is
        solved."""
        *earlier, last = layers.values()
        random = [] if self.trains_layers else earlier if spec.is_last else [*earlier, last]
        return [*random, last_linear(last)] if spec.is_last and self.closed_form else random

    def width(self, spec: BlockSpec) -> int:
        """Return the number of features of a sample that enter the head."""
        if spec.is_last and self.closed_form:
            return model_head_linear(spec).in_features
        return pooling.width(spec.output_shape, self.features)

    def has_head(self, spec: BlockSpec) -> bool:
        """Whether it is an earlier block, or the last one with sums for the model's own head."""
        return self.closed_form or not spec.is_last

    def build_head(self, block: BlockSpec) -> Readout:
        """Return the head of an earlier block; in the last one the sums for the model's own."""
        pool = (
            nn.Identity() if block.is_last else pooling.make_pool(block.output_shape, self.features)
        )
        return Readout(
            pool, self.width(block), block.classes, self.closed_form, with_linear=not block.is_last
        )

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...] | None:
        """Return the shape of the output, in the last block that of the features."""
        return (self.width(spec),) if spec.is_last else spec.output_shape

    def taps(self, block: Block) -> Sequence[str]:
        """Tap the input of the linear map that is solved in the last block."""
        tap_head_input(block)
        return ()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss () that `head` names, "ce" excepted: that is the task's."""
        return LOSSES[self.head](output, target)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the loss of the head, and add the samples to the sums if heads are solved."""
        output, targets, task = micro_batch.y, micro_batch.targets, micro_batch.task
        if self.closed_form and not task.class_per_sample:
            targets = task.target_vectors(targets, spec.classes)
        if block.head is not None:
            scores = block.head(head_features(block, micro_batch), targets)
            output = output if spec.is_last else scores
        if self.head == "ce":
            loss = micro_batch.mean_loss(output.reshape(-1, *spec.scores_shape))
        else:
            loss = self.loss(output.reshape(len(output), -1), targets)
        return [scaled_loss_pair(micro_batch, loss)]

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the prediction (rows, ...) of the head, or of the model's own."""
        if spec.is_last:
            return micro_batch.y
        return super().predict(spec, block, micro_batch).reshape(-1, *spec.scores_shape)

    def solve(self, spec: BlockSpec, block: Block) -> None:
        """Solve the head from the sums, except the model's own in a last block that is frozen."""
        if not self.closed_form or (spec.is_last and spec.frozen):
            return
        assert isinstance(block.head, Readout)
        *_, last = block.layers.values()
        block.head.solve(block.head.linear or last_linear(last))
        if self.trains_layers and block.head.sample_count >= spec.train_samples:
            block.head.reset_sums()

    def vote(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return probabilities (rows, classes)."""
        return sparsemax(scores) if self.head == "sparsemax" else scores.softmax(1)

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of large sums, and of more features than samples."""
        widths = [self.width(spec) for spec in specs] if self.closed_form else []
        return width_warnings(widths, specs[0].train_samples)


def sparsemax(scores: Tensor) -> Tensor:
    """Return the probabilities (rows, classes) nearest to `scores`; many are exactly 0.

    Martins and Astudillo, "From softmax to sparsemax", arXiv 1602.02068, algorithm 1. With tau such
    that p sums to 1 and S the indices with p > 0: p = max(z - tau, 0), tau = (sum of z over S - 1)
    / |S|.
    """
    ordered = scores.sort(dim=1, descending=True).values
    counts = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype, device=scores.device)
    thresholds = (ordered.cumsum(1) - 1) / counts
    size = (ordered > thresholds).sum(1, keepdim=True)  # the support is a prefix
    return (scores - thresholds.gather(1, size - 1)).clamp(min=0)


def sparsemax_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the sparsemax loss () of scores z (rows, classes) for labels y (rows,): a mean over
    rows.

    Per row, with p and S of `sparsemax`::

        L = -z_y + 1/2 sum over S of (z^2 - tau^2) + 1/2 = <p, z> - |p|^2 / 2 + 1/2 - z_y
        dL/dz = p - onehot(y)

    L is never negative, and 0 exactly where p is the label's one-hot. <p, z> - |p|^2 / 2 is the
    largest value over all p, so p need not be differentiated.
    """
    p = sparsemax(scores.detach())
    true_scores = scores.gather(1, targets[:, None])[:, 0]
    return ((p * scores).sum(1) - p.square().sum(1) / 2 + 0.5 - true_scores).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "least-squares": mean_squared_error,
    "sparsemax": sparsemax_loss,
}
