"""F3, feed-forward with delayed feedback: the cotangent is a sample's error of the epoch before.

Flügel, Coquelin, Weiel, Debus, Streit and Götz 2023, "Feed-Forward Optimization With Delayed
Feedback for Neural Networks", arXiv 2304.13372. With Y the one-hot label of a sample, p(t-1) the
model's output for it in the epoch before and B_k (C, d_k) fixed and random, the cotangent of the
flat output h_k of block k in epoch t is e B_k::

    e = Y - p(t-1)        p(0) = 0, so that the first epoch is DRTP: e = Y

    epoch t   x, Y, index n of the sample
              --> block 0 --h_0--> block 1 --h_1--> block 2 --> out, model's head, cross-entropy
                     ^                ^                |
               (Y - p[n]) B_0   (Y - p[n]) B_1     fresh[n] = softmax(out)
                     |                |                |
    its end       table p  <------ table p  <------ table p     over replicas, then over the stages

Nothing is sent back during training, so the default schedule is "stream". Each block holds the
table p, (N, C) numbers for N training samples, and looks up its samples by index, as it does their
labels. The last block writes its outputs into a second table; at the end of a segment all tables
become that one. A sample is seen once per epoch, so segments shorter than an epoch train the same
bits, and each sends the whole table once more. With `one_hot` only the error of the true class is
kept, one number per sample, and e is zero elsewhere. One block is ordinary backpropagation without
a table.

With another loss than the plain cross-entropy of labels the table keeps raw outputs, zeros at
first, and e is the negative gradient of each sample's loss at its output.

e is the *negative* of DFA's error: with equal matrices and constant weights the cotangent is that
of DFA with -B. A matrix is as likely as its negative (except "binary"), so blocks align with both.

With random augmentation the error belongs to another view of the image. Replicas with local updates
share one table: a sample's error is that of the replica that saw it last.

Invariant: p is the model's output when it saw the sample last; it has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import Objective, loss_pair, needs_labels
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.random_feedback import MatrixKind, random_matrix
from dtrain.tasks.task import Task

LARGE_TABLE_BYTES = 2**28
"""Bytes of a block's table above which the run warns."""


DELAYED_ERROR = "delayed_error"


@final
@dataclass(frozen=True)
class F3(Objective):
    """A fixed matrix per earlier block, a table of outputs in each. The last block predicts; the
    others have no scores.

    Parameters
    ----------
    error : str
        The output in the error: "softmax" of the scores (e is then the negative gradient of the
        loss), or the raw "output", the paper's "delayed error", which suits models whose outputs
        are near 0 and 1.
    one_hot : bool
        Whether only the error of the true class is kept.
    feedback : str
        Distribution of the matrices: see `random_matrix`.
    """

    accumulated_buffers: ClassVar[tuple[str, ...]] = ("fresh", "seen")
    broadcast_buffers: ClassVar[tuple[str, ...]] = ("answers",)

    error: Literal["softmax", "output"] = "softmax"
    one_hot: bool = False
    feedback: MatrixKind = "kaiming"

    def serves(self, task: Task) -> str | None:
        """Return None, unless `one_hot` needs labels."""
        return needs_labels(task) if self.one_hot else None

    def has_head(self, spec: BlockSpec) -> bool:
        """Whether there are several blocks: all of them have a table then."""
        return spec.blocks > 1

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the table, with the matrix of an earlier block."""
        return AnswerTable(self.feedback, block, self.one_hot)

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...] | None:
        """Return None: the head has no forward."""
        return None

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the output with the cotangent e B, or in the last block the loss."""
        table = block.head
        if spec.is_last:
            if isinstance(table, AnswerTable):
                table.add(micro_batch.indices, self.current_answers(micro_batch))
            return [loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(table, AnswerTable)
        error = self.delayed_error(spec, table.answers[micro_batch.indices], micro_batch)
        micro_batch.metrics[DELAYED_ERROR] = error.norm(dim=1).mean()
        cotangent = micro_batch.sample_scale * error @ table.feedback
        return [(micro_batch.y, cotangent.view_as(micro_batch.y))]

    def delayed_error(self, spec: BlockSpec, answers: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Return e (rows, outputs), given the rows of the table."""
        task, targets = micro_batch.task, micro_batch.targets
        if not task.has_softmax_error:
            outputs = answers.view(len(answers), *spec.scores_shape)
            return -task.output_gradient(outputs, targets).flatten(1)
        labels = one_hot(targets, spec.classes)
        return labels * (1 - answers)[:, None] if self.one_hot else labels - answers

    def current_answers(self, micro_batch: MicroBatch) -> Tensor:
        """Return the last block's outputs (rows, C), or with `one_hot` those (rows,) of the true
        class."""
        scores = micro_batch.y.detach()
        if not micro_batch.task.has_softmax_error:
            return scores.reshape(len(scores), -1)
        answers = scores.softmax(1) if self.error == "softmax" else scores
        return answers.gather(1, micro_batch.targets[:, None])[:, 0] if self.one_hot else answers

    def solve(self, spec: BlockSpec, block: Block) -> None:
        """Put the outputs of this segment into the table of the last block."""
        if spec.is_last and isinstance(block.head, AnswerTable):
            block.head.commit()

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of raw outputs and of large tables."""
        if len(specs) == 1:
            return []
        warnings = []
        if self.error == "output":
            warnings.append(
                "'f3' with error = \"output\" subtracts raw scores from the labels; under the last "
                "block's cross-entropy scores outgrow 0 and 1, and the cotangents with them: set "
                'error = "softmax"'
            )
        samples, classes = specs[-1].train_samples, 1 if self.one_hot else specs[-1].scores_width
        size = samples * classes * specs[-1].dtype.itemsize
        if size >= LARGE_TABLE_BYTES:
            smaller = "" if self.one_hot else f"; one-hot = true keeps {samples:,} numbers instead"
            warnings.append(
                f"'f3' keeps {samples:,} x {classes} errors of {size / 1e9:.1f} GB in each of "
                f"{len(specs)} blocks and twice more in the last, and sends them to all blocks at "
                f"the end of every segment{smaller}"
            )
        return warnings


@final
class AnswerTable(nn.Module):
    """The model's last output for each training sample.

    ::

        answers      ----- read by the samples' indices ----->  errors         in earlier blocks
        fresh, seen  <---- written by the samples' indices ---- scores         in the last block

    Invariant: `answers` changes only at the end of a segment, in the last block first. `fresh` and
    `seen` are zero then, so they can be summed over replicas. A sample that a sampler has drawn
    several times in the segment has the mean of its outputs.

    Attributes
    ----------
    feedback : Tensor
        The matrix (C, width) of an earlier block.
    answers : Tensor
        (N, C), or (N,) for the true class alone.
    fresh : Tensor
        In the last block, like `answers`: the sums of the outputs of this segment.
    seen : Tensor
        In the last block, (N,): how often a sample was seen in this segment.
    """

    identical_buffers = ("feedback", "answers", "fresh", "seen")
    feedback: Tensor
    answers: Tensor
    fresh: Tensor
    seen: Tensor

    def __init__(self, kind: MatrixKind, spec: BlockSpec, one_hot: bool) -> None:
        super().__init__()
        if not spec.is_last:
            matrix = random_matrix(kind, spec.scores_width, math.prod(spec.output_shape))
            self.register_buffer("feedback", matrix)
        shape = (spec.train_samples,) if one_hot else (spec.train_samples, spec.scores_width)
        self.register_buffer("answers", torch.zeros(shape))
        if spec.is_last:
            self.register_buffer("fresh", torch.zeros(shape))
            self.register_buffer("seen", torch.zeros(spec.train_samples))

    @torch.no_grad()
    def add(self, indices: Tensor, outputs: Tensor) -> None:
        """Add the outputs of samples of this segment."""
        self.fresh.index_add_(0, indices, outputs.to(self.fresh.dtype))
        self.seen.index_add_(0, indices, torch.ones_like(indices, dtype=self.seen.dtype))

    @torch.no_grad()
    def commit(self) -> None:
        """Copy the means to `answers` where samples were seen; clear `fresh` and `seen`."""
        seen = self.seen.view(-1, *[1] * (self.fresh.dim() - 1))
        means = self.fresh / seen.clamp(min=1)
        self.answers.copy_(torch.where(seen > 0, means, self.answers))
        self.fresh.zero_()
        self.seen.zero_()
