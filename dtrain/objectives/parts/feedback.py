"""Fixed random matrices that bring an error, or the label, to a block: (classes, width).

Invariant: they are drawn once, when the block's helper is built, under the run's seed and the
block's number; nobody trains them, and they are buffers, so checkpoints and digests hold them.

Sources, as read in their code: "uniform" TinyDFA (Launay et al. 2020); "kaiming" DRTP (Frenkel et
al. 2019); the others F3 (Flügel et al. 2023).
"""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from torch import Tensor, nn

from dtrain.objectives.objective import Objective
from dtrain.objectives.task import Task

Matrix = Literal["uniform", "kaiming", "ternary", "binary", "identity"]


def matrix(kind: Matrix, classes: int, width: int) -> Tensor:
    """Return a matrix (classes, width) in torch's default dtype, from torch's own generator.

    Parameters
    ----------
    kind : str
        "uniform" in [-1, 1); "kaiming" uniform within sqrt(6 / width); "ternary" of -1, 0, 1;
        "binary" of 0, 1; "identity" repeated sideways, each copy with a random sign.
    """
    shape = (classes, width)
    match kind:
        case "uniform":
            return 2 * torch.rand(shape) - 1
        case "kaiming":
            return nn.init.kaiming_uniform_(torch.empty(shape))
        case "ternary":
            return torch.randint(-1, 2, shape).to(torch.get_default_dtype())
        case "binary":
            return torch.randint(0, 2, shape).to(torch.get_default_dtype())
        case "identity":
            copies = -(-width // classes)
            signs = 2 * torch.randint(0, 2, (copies,)) - 1
            return torch.cat([sign * torch.eye(classes) for sign in signs], 1)[:, :width]


@final
class Fixed(nn.Module):
    """Holds a matrix as the buffer ``feedback``; it has no forward."""

    alike = ("feedback",)
    feedback: Tensor

    def __init__(self, kind: Matrix, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("feedback", matrix(kind, classes, width))


class Pushed(Objective):
    """A fixed matrix per earlier block, drawn as `feedback` says; the last one has none."""

    feedback: Matrix

    def build(self, task: Task) -> nn.Module | None:
        """Return the matrix of an earlier block, none at the end."""
        width = math.prod(task.outputs)
        return None if task.last else Fixed(self.feedback, task.classes, width)

    def helped(self, task: Task) -> tuple[int, ...] | None:
        """Nothing is run: errors are multiplied by a matrix, labels look up its rows."""
        return None
