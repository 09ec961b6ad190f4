"""DFA, direct feedback alignment: the last block's error goes straight to every block.

Nøkland 2016, arXiv 1609.01596; Launay et al. 2020, arXiv 2006.12878 (its code, TinyDFA). With
e = softmax(out) - onehot (rows, C) and a fixed random B_k (C, d_k), block k pulls its flat output
h_k along e B_k; one layer as a block is the paper's delta_k = (e B_k) * phi'(z_k)::

    F   x --> block 0 --h_0--> block 1 --h_1--> block 2 --> out, own head, cross-entropy
                 ^                ^                |
    B          e B_0            e B_1 <---- e -----'            C numbers per sample and block

The error is born in the last block, scaled once there. Nothing but it comes back, and by default
("pipelined") nobody waits for it: an update follows every micro-batch, and the error reaches block
b of K after K - b of them (the run's `staleness`; the last block's is 0). "1f1b" and "drained" are
the synchronous form, with micro-batches. One block is ordinary backpropagation.

TinyDFA has *one* matrix (C, max d), whose first d_k columns are layer k's, and divides by
sqrt(max d); here each block draws its own and divides by sqrt(d_k) (`normalised`): equal where all
widths are, else its narrow layers get a smaller force. Its uniform numbers in [-1, 1) are ours.

Alignment is what makes it learn: the angle between e B_k and the true gradient at h_k falls below
90 degrees, since the weights above come to resemble B_k. `angles` records it per block, as the mean
over samples of the angle between the two vectors of each (90 where one of them is zero), so that
no cut into micro-batches changes it. It costs backpropagation's messages and a second backward of
each inner block. Under "pipelined" both wait for the gradient, 2 (K - 1 - b) updates.

Invariant: a block's force depends on the last block's error and on its own matrix alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import GRADIENT, ExecutionMode, forward_routes, scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.random_feedback import FixedMatrix, MatrixKind, RandomFeedback
from dtrain.schedules.actions import Point, Route

ERROR, TRUE_GRADIENT, ANGLE = "error", "true gradient of x", "alignment_deg"


@final
@dataclass(frozen=True)
class Dfa(RandomFeedback):
    """A fixed matrix per earlier block; prediction: the last block's, the others have none.

    Parameters
    ----------
    feedback : str
        How the matrices are drawn: see `feedback`.
    normalised : bool
        Whether the force on a block of d outputs is divided by sqrt(d).
    angles : bool
        Whether the angles between the forces and the true gradients are recorded.
    """

    default_schedule: ClassVar[str] = "pipelined"

    feedback: MatrixKind = "uniform"
    normalised: bool = True
    angles: bool = False

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Activations go on; the error goes to all; where angles are asked for, gradients too."""
        inner = range(blocks - 1) if mode == "train" else ()
        if not self.angles:
            error = (Route(Point(blocks - 1, "B"), Point(b, "B"), ERROR) for b in inner)
            return (*forward_routes(blocks), *error)
        # Block by block, beside the gradient: it would wait for that, and others for its receipt.
        hops = [(Point(b + 1, "B"), Point(b, "B")) for b in inner]
        return (
            *forward_routes(blocks),
            *(Route(*hop, name) for hop in hops for name in (ERROR, GRADIENT)),
        )

    def message_spec(
        self, route: Route, specs: Sequence[BlockSpec], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return (rows, classes) for the error."""
        wide = (rows, specs[-1].classes), specs[-1].dtype
        return wide if route.name == ERROR else super().message_spec(route, specs, rows)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Give the error, and the true gradient, which in an inner block ``x.grad`` is not."""
        assert micro_batch is not None
        if route.name == ERROR and ERROR in micro_batch.received:
            return micro_batch.received[ERROR]
        if route.name == ERROR:
            error = micro_batch.y.detach().softmax(1) - one_hot(
                micro_batch.targets, micro_batch.y.shape[1]
            )
            return micro_batch.loss_scale / len(error) * error
        if route.name == GRADIENT and TRUE_GRADIENT in micro_batch.received:
            return micro_batch.received[TRUE_GRADIENT]
        return super().make_message(route, block, micro_batch)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the output along the error; at the end the true loss."""
        if spec.is_last:
            return [scaled_loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(block.head, FixedMatrix)
        matrix = block.head.feedback
        force = micro_batch.received[ERROR].to(matrix.dtype) @ matrix
        if self.angles:
            micro_batch.metrics[ANGLE] = mean_angle_deg(
                force, micro_batch.received[GRADIENT].flatten(1)
            )
            if micro_batch.x.requires_grad:  # else nobody asks for it
                micro_batch.received[TRUE_GRADIENT] = input_gradient(micro_batch)
        if self.normalised:
            force = force / math.sqrt(matrix.shape[1])
        return [(micro_batch.y, force.view_as(micro_batch.y))]

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Say that convolutions are not for it."""
        images = [str(task.index) for task in specs[:-1] if len(task.output_shape) == 3]
        if not images:
            return []
        return [
            f"the outputs of {len(images)} of {len(specs) - 1} blocks that 'dfa' pushes are images "
            f"(block {', '.join(images)}): it is known to fail on convolutions, suspected to be "
            "too narrow to align; 'local-head' trains them"
        ]


def mean_angle_deg(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean over rows of the angle in degrees between the vectors (rows, width)."""
    # The least norm is far below that of any error; torch's own cosine starts at 1e-8.
    a, b = (normalize(each.double(), eps=1e-100) for each in (left, right))
    # By the half angle: an arc cosine near 1 would lose half of the digits.
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))).mean()


def input_gradient(micro_batch: MicroBatch) -> Tensor:
    """Return the true gradient at x, given that at y; the graph remains for what is learnt."""
    told = micro_batch.received[GRADIENT]
    (found,) = torch.autograd.grad(
        micro_batch.y, micro_batch.x, told, retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(micro_batch.x) if found is None else found
