"""A table of what the net answered to each sample, for objectives that learn from the epoch before.

::

    answers  ----- looked up by the samples' numbers ----->  errors        in every block
    fresh, seen  <---- written by the same numbers ----- scores            in the last one

Invariant: `answers` changes at segment ends alone, in the last block first; `fresh` and `seen` are
zero then, so they add up over replicas, each of which saw other samples.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from dtrain.objectives.parts.feedback import Matrix, matrix
from dtrain.objectives.task import Task


@final
class Answers(nn.Module):
    """What the net answered to each sample; the last block also holds what it answers now.

    Attributes
    ----------
    answers, fresh : Tensor
        (samples, classes), or (samples,) for the true class alone.
    seen : Tensor
        (samples,): 1 where `fresh` has been written since the last segment's end.
    """

    alike = ("feedback", "answers", "fresh", "seen")
    feedback: Tensor
    answers: Tensor
    fresh: Tensor
    seen: Tensor

    def __init__(self, kind: Matrix, task: Task, one_hot: bool) -> None:
        super().__init__()
        if not task.last:
            drawn = matrix(kind, task.classes, math.prod(task.outputs))
            self.register_buffer("feedback", drawn)
        wide = (task.samples,) if one_hot else (task.samples, task.classes)
        self.register_buffer("answers", torch.zeros(wide))
        if task.last:
            self.register_buffer("fresh", torch.zeros(wide))
            self.register_buffer("seen", torch.zeros(task.samples))

    @torch.no_grad()
    def take_over(self) -> None:
        """Answer as was seen, and forget that."""
        was = self.seen.view(-1, *[1] * (self.fresh.dim() - 1)) > 0
        self.answers.copy_(torch.where(was, self.fresh, self.answers))
        self.fresh.zero_()
        self.seen.zero_()
