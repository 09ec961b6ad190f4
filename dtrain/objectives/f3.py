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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor, nn
from torch.nn.functional import one_hot

from dtrain.block import Block, Pull
from dtrain.live import Live
from dtrain.objectives.objective import Objective, born
from dtrain.objectives.parts.answers import Answers
from dtrain.objectives.parts.feedback import Matrix
from dtrain.objectives.task import Task

LARGE = 2**28
"""Bytes of a block's table from which on a user is told."""

FIGURE = "delayed_error"


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

    sums: ClassVar[tuple[str, ...]] = ("fresh", "seen")
    spread: ClassVar[tuple[str, ...]] = ("answers",)

    error: Literal["softmax", "output"] = "softmax"
    one_hot: bool = False
    feedback: Matrix = "kaiming"

    def build(self, task: Task) -> nn.Module | None:
        """Return the matrix and the table; none where one block learns by backpropagation."""
        return None if task.blocks == 1 else Answers(self.feedback, task, self.one_hot)

    def helped(self, task: Task) -> tuple[int, ...] | None:
        """Nothing is run: rows of a table are looked up."""
        return None

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the output along the sample's last error; at the end the true loss."""
        helper = block.helper
        if task.last:
            if isinstance(helper, Answers):
                helper.fresh[live.indices] = self.answered(live)
                helper.seen[live.indices] = 1
            return [born(live, live.y)]
        assert isinstance(helper, Answers)
        wanted = one_hot(live.targets, task.classes)
        known = helper.answers[live.indices]
        error = wanted * (1 - known)[:, None] if self.one_hot else wanted - known
        live.figures[FIGURE] = error.norm(dim=1).mean()
        force = live.share / len(error) * error @ helper.feedback
        return [(live.y, force.view_as(live.y))]

    def answered(self, live: Live) -> Tensor:
        """Return what the last block answers: (rows, classes), or (rows,) of the true class."""
        scores = live.y.detach()
        answers = scores.softmax(1) if self.error == "softmax" else scores
        return answers.gather(1, live.targets[:, None])[:, 0] if self.one_hot else answers

    def solve(self, task: Task, block: Block) -> None:
        """Let what was answered in this segment be what is known."""
        if task.last and isinstance(block.helper, Answers):
            block.helper.take_over()

    def cautions(self, tasks: Sequence[Task], rows: int) -> list[str]:
        """Tell of raw outputs, and of large tables."""
        if len(tasks) == 1:
            return []
        told = []
        if self.error == "output":
            told.append(
                "'f3' with error = \"output\" takes raw scores for answers, which outgrow targets "
                "of 0 and 1 under the last block's cross-entropy, and the force with them: set "
                'error = "softmax"'
            )
        samples, classes = tasks[-1].samples, 1 if self.one_hot else tasks[-1].classes
        size = samples * classes * tasks[-1].dtype.itemsize
        if size < LARGE:
            return told
        smaller = "" if self.one_hot else f"; one-hot = true keeps {samples:,} numbers instead"
        return [
            *told,
            f"'f3' keeps {samples:,} x {classes} errors of {size / 1e9:.1f} GB in each of "
            f"{len(tasks)} blocks and twice more in the last, and sends them to all at every "
            f"segment's end{smaller}",
        ]
