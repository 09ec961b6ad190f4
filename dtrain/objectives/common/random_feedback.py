"""Fixed random feedback matrices (classes, width) that map an error or a label to a block's output.

::

    x --> block 0 --h_0--> block 1 --h_1--> block 2 --> model's head, cross-entropy
             ^                ^
       signal B_0       signal B_1        signal: error or one-hot label (rows, C)

Invariant: a matrix is drawn once, when the head is built, under the run's seed and the block's
number. It is a buffer, not a parameter: it is never trained, and is part of checkpoints and
digests.

Sources of the distributions, from the code of the methods: "uniform" TinyDFA (Launay et al. 2020);
"kaiming" DRTP (Frenkel et al. 2019); the others F3 (Flügel et al. 2023).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import Objective, loss_pair
from dtrain.objectives.block_spec import BlockSpec

MatrixKind = Literal["uniform", "kaiming", "ternary", "binary", "identity"]


class RandomFeedback(Objective):
    """A fixed matrix per earlier block, of the distribution `feedback`; the last block learns the
    loss of the model's own head."""

    feedback: MatrixKind

    @abstractmethod
    def feedback_pair(
        self, spec: BlockSpec, micro_batch: MicroBatch, matrix: Tensor
    ) -> BackwardPair:
        """Return the backward pair of an earlier block, given its matrix (classes, width)."""

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the matrix of an earlier block."""
        return FixedMatrix(self.feedback, block.scores_width, math.prod(block.output_shape))

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...] | None:
        """Return None: the head has no forward."""
        return None

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the pair of the feedback, or in the last block the loss."""
        if spec.is_last:
            return [loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(block.head, FixedMatrix)
        return [self.feedback_pair(spec, micro_batch, block.head.feedback)]


@final
class FixedMatrix(nn.Module):
    """A random matrix (classes, width) in the buffer ``feedback``; it has no forward."""

    identical_buffers = ("feedback",)
    feedback: Tensor

    def __init__(self, kind: MatrixKind, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("feedback", random_matrix(kind, classes, width))


def random_matrix(kind: MatrixKind, classes: int, width: int) -> Tensor:
    """Return a random matrix (classes, width) in torch's default dtype, from torch's generator.

    Parameters
    ----------
    kind : str
        "uniform" in [-1, 1); "kaiming" uniform within sqrt(6 / width); "ternary" of -1, 0, 1;
        "binary" of 0, 1; "identity" repeated along the width, each copy with a random sign.
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


def convolution_warnings(name: str, specs: Sequence[BlockSpec], reason: str) -> list[str]:
    """Return a warning, that ends with `reason`, if earlier blocks of objective `name` have images
    as outputs."""
    earlier = specs[:-1]
    images = [str(spec.index) for spec in earlier if len(spec.output_shape) == 3]
    if not images:
        return []
    return [
        f"the outputs of {len(images)} of {len(earlier)} blocks that '{name}' trains are images "
        f"(block {', '.join(images)}): {reason}; use 'local-head' for convolutions"
    ]
