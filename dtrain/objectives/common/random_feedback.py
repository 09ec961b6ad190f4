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

from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec

MatrixKind = Literal["uniform", "kaiming", "ternary", "binary", "identity"]


def random_matrix(kind: MatrixKind, classes: int, width: int) -> Tensor:
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
class FixedMatrix(nn.Module):
    """Holds a matrix as the buffer ``feedback``; it has no forward."""

    identical_buffers = ("feedback",)
    feedback: Tensor

    def __init__(self, kind: MatrixKind, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("feedback", random_matrix(kind, classes, width))


class RandomFeedback(Objective):
    """A fixed matrix per earlier block, drawn as `feedback` says; the last one has none."""

    feedback: MatrixKind

    def build_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return the matrix of an earlier block, none at the end."""
        width = math.prod(spec.output_shape)
        return None if spec.is_last else FixedMatrix(self.feedback, spec.classes, width)

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...] | None:
        """Nothing is run: errors are multiplied by a matrix, labels look up its rows."""
        return None
