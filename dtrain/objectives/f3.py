"""F3, feed-forward with delayed feedback: the error that a sample had an epoch ago.

Flügel, Coquelin, Weiel, Debus, Streit and Götz 2023, "Feed-Forward Optimization With Delayed
Feedback for Neural Networks", arXiv 2304.13372. With Y the one-hot label of a sample, p(t-1) what
the net answered to it in the epoch before and B_k (C, d_k) fixed and random, block k pulls its flat
output h_k in epoch t along e B_k::

    e = Y - p(t-1)        p(0) = 0, so that the first epoch is DRTP: e = Y

    epoch t   x, Y, number n of the sample
              --> block 0 --h_0--> block 1 --h_1--> block 2 --> out, own head, cross-entropy
                     ^                ^                |
               (Y - p[n]) B_0   (Y - p[n]) B_1     fresh[n] = softmax(out)
                     |                |                |
    its end       table p  <------ table p  <------ table p     over replicas, then over the stages

Nothing flows back while blocks learn, so "stream" is the schedule. Each block holds the table p,
(N, C) numbers for N training samples, and looks up its samples by number, as it does their labels.
The last block writes what it answers beside its table, and at a segment's end all tables become
that. A sample is seen once per epoch, so segments shorter than an epoch train the same bits; each
of them sends the whole table once more. With `one_hot` only the true class' error is kept, one
number per sample, and e is zero elsewhere. One block is ordinary backpropagation, without a table.

e is the *negative* of DFA's error, so with equal matrices and a net that stands still the force is
that of DFA with -B. Matrices are as likely as their negatives ("binary" excepted), so blocks align
with either.

With random augmentation the error belongs to another view of the image. Replicas that train apart
share one table: a sample's error is then that of the replica that saw it last.

Invariant: p is what the net answered when it saw the sample last; nobody's gradient touches it.
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
from dtrain.objectives.base import Objective, scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.random_feedback import MatrixKind, random_matrix

LARGE_TABLE_BYTES = 2**28
"""Bytes of a block's table from which on a user is told."""


METRIC = "delayed_error"


@final
@dataclass(frozen=True)
class F3(Objective):
    """A fixed matrix per earlier block, a table in each; prediction: the last block's alone.

    Parameters
    ----------
    error : str
        What answers are: "softmax" of the scores (e is then the negative gradient of the loss), or
        the raw "output", the paper's "delayed error", which is for nets that answer 0 and 1.
    one_hot : bool
        Whether only the true class' error is kept.
    feedback : str
        How the matrices are drawn: see `feedback`.
    """

    accumulated_buffers: ClassVar[tuple[str, ...]] = ("fresh", "seen")
    broadcast_buffers: ClassVar[tuple[str, ...]] = ("answers",)

    error: Literal["softmax", "output"] = "softmax"
    one_hot: bool = False
    feedback: MatrixKind = "kaiming"

    def build_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return the matrix and the table; none where one block learns by backpropagation."""
        return None if spec.blocks == 1 else AnswerTable(self.feedback, spec, self.one_hot)

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...] | None:
        """Nothing is run: rows of a table are looked up."""
        return None

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the output along the sample's last error; at the end the true loss."""
        helper = block.head
        if spec.is_last:
            if isinstance(helper, AnswerTable):
                helper.fresh[micro_batch.indices] = self.current_answers(micro_batch)
                helper.seen[micro_batch.indices] = 1
            return [scaled_loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(helper, AnswerTable)
        wanted = one_hot(micro_batch.targets, spec.classes)
        known = helper.answers[micro_batch.indices]
        error = wanted * (1 - known)[:, None] if self.one_hot else wanted - known
        micro_batch.metrics[METRIC] = error.norm(dim=1).mean()
        force = micro_batch.loss_scale / len(error) * error @ helper.feedback
        return [(micro_batch.y, force.view_as(micro_batch.y))]

    def current_answers(self, micro_batch: MicroBatch) -> Tensor:
        """Return what the last block answers: (rows, classes), or (rows,) of the true class."""
        scores = micro_batch.y.detach()
        answers = scores.softmax(1) if self.error == "softmax" else scores
        return answers.gather(1, micro_batch.targets[:, None])[:, 0] if self.one_hot else answers

    def solve(self, spec: BlockSpec, block: Block) -> None:
        """Let what was answered in this segment be what is known."""
        if spec.is_last and isinstance(block.head, AnswerTable):
            block.head.commit()

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Tell of raw outputs, and of large tables."""
        if len(specs) == 1:
            return []
        told = []
        if self.error == "output":
            told.append(
                "'f3' with error = \"output\" takes raw scores for answers, which outgrow targets "
                "of 0 and 1 under the last block's cross-entropy, and the force with them: set "
                'error = "softmax"'
            )
        samples, classes = specs[-1].train_samples, 1 if self.one_hot else specs[-1].classes
        size = samples * classes * specs[-1].dtype.itemsize
        if size < LARGE_TABLE_BYTES:
            return told
        smaller = "" if self.one_hot else f"; one-hot = true keeps {samples:,} numbers instead"
        return [
            *told,
            f"'f3' keeps {samples:,} x {classes} errors of {size / 1e9:.1f} GB in each of "
            f"{len(specs)} blocks and twice more in the last, and sends them to all at every "
            f"segment's end{smaller}",
        ]


@final
class AnswerTable(nn.Module):
    """What the net answered to each sample; the last block also holds what it answers now.

    Attributes
    ----------
    answers, fresh : Tensor
        (samples, classes), or (samples,) for the true class alone.
    seen : Tensor
        (samples,): 1 where `fresh` has been written since the last segment's end.
    """

    identical_buffers = ("feedback", "answers", "fresh", "seen")
    feedback: Tensor
    answers: Tensor
    fresh: Tensor
    seen: Tensor

    def __init__(self, kind: MatrixKind, spec: BlockSpec, one_hot: bool) -> None:
        super().__init__()
        if not spec.is_last:
            drawn = random_matrix(kind, spec.classes, math.prod(spec.output_shape))
            self.register_buffer("feedback", drawn)
        wide = (spec.train_samples,) if one_hot else (spec.train_samples, spec.classes)
        self.register_buffer("answers", torch.zeros(wide))
        if spec.is_last:
            self.register_buffer("fresh", torch.zeros(wide))
            self.register_buffer("seen", torch.zeros(spec.train_samples))

    @torch.no_grad()
    def commit(self) -> None:
        """Answer as was seen, and forget that."""
        was = self.seen.view(-1, *[1] * (self.fresh.dim() - 1)) > 0
        self.answers.copy_(torch.where(was, self.fresh, self.answers))
        self.fresh.zero_()
        self.seen.zero_()
