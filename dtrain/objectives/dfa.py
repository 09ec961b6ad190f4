"""DFA, direct feedback alignment: the last block's error is sent directly to every block.

Nøkland 2016, arXiv 1609.01596; Launay et al. 2020, arXiv 2006.12878 (its code, TinyDFA). With
e = softmax(out) - onehot (rows, C), or the gradient of another loss at each sample's output, and a
fixed random B_k (C, d_k), the cotangent of the flat output h_k of block k is e B_k. With one layer
as a block this is the paper's delta_k = (e B_k) * phi'(z_k)::

    F   x --> block 0 --h_0--> block 1 --h_1--> block 2 --> out, model's head, cross-entropy
                 ^                ^                |
    B          e B_0            e B_1 <---- e -----'            C numbers per sample and block

The error is computed and scaled once, in the last block; nothing else is sent back. Under the
default, "pipelined", no block waits: an update follows every micro-batch, and the error reaches
block b of K after K - b updates (the run's `staleness`; that of the last block is 0). "1f1b" and
"drained" are the synchronous form, with micro-batches. One block is ordinary backpropagation.

DFA learns by alignment: the angle between e B_k and the true gradient at h_k falls below 90
degrees, since the weights downstream become similar to B_k. `angles` records it per block, as the
mean over samples of the angle between the two vectors (90 if one of them is zero), so that it does
not depend on the cut into micro-batches. It costs the messages of backpropagation and a second
backward of each inner block. Under "pipelined" error and gradient then take 2 (K - 1 - b) updates.

Unlike here, TinyDFA has *one* matrix (C, max d), whose first d_k columns are layer k's, and divides
by sqrt(max d). Here each block draws its own matrix and divides by sqrt(d_k) (`normalised`). Both
are equal if all widths are; otherwise narrow layers have smaller cotangents in TinyDFA. The uniform
distribution in [-1, 1) is the one of its code.

Where a target has positions, one matrix from all outputs to the whole flat block output is the
default: (P C, P d) numbers with P positions. With `per-position` the error of each position goes to
that position alone, through one matrix (C, d): the form of the papers' transformers, whose error is
one per token.

Invariant: a block's cotangent depends on the last block's error and on its own matrix alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dtrain import eager_torch
from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import (
    ERROR,
    GRADIENT,
    ExecutionMode,
    forward_routes,
    output_error,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.prediction_heads import PositionLayout, position_layout
from dtrain.objectives.common.random_feedback import (
    FixedMatrix,
    MatrixKind,
    RandomFeedback,
    convolution_warnings,
)
from dtrain.schedules.actions import Point, Route
from dtrain.tasks.task import Task

TRUE_GRADIENT, ANGLE = "true gradient of x", "alignment_deg"


MAX_MATRIX_NUMBERS = 2**22
"""Numbers of a matrix over all positions from which a plan warns of it: 16 MiB in float32."""


@final
@dataclass(frozen=True)
class Dfa(RandomFeedback):
    """A fixed matrix per earlier block. The last block predicts; the others have no scores.

    Parameters
    ----------
    feedback : str
        Distribution of the matrices: see `random_matrix`.
    normalised : bool
        Whether the cotangent of a block with d outputs is divided by sqrt(d).
    angles : bool
        Whether the angles between cotangents and true gradients are recorded.
    per_position : bool
        Whether the error of each position is sent to that position alone.
    """

    default_schedule: ClassVar[str] = "pipelined"

    feedback: MatrixKind = "uniform"
    normalised: bool = True
    angles: bool = False
    per_position: bool = False

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the matrix of an earlier block; per position from C outputs to d channels."""
        if not self.per_position:
            return super().build_head(block)
        layout = _checked_layout(block)
        return FixedMatrix(self.feedback, layout.outputs, layout.channels)

    def serves(self, task: Task) -> None:
        """Return None: every differentiable loss is served."""

    def takes_sample_weights(self) -> bool:
        """Return True."""
        return True

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward and the error from the last block to all others; with `angles`
        also gradients back."""
        earlier = range(blocks - 1) if mode == "train" else ()
        if not self.angles:
            errors = (Route(Point(blocks - 1, "B"), Point(b, "B"), ERROR) for b in earlier)
            return (*forward_routes(blocks), *errors)
        # Block by block, beside the gradient: sent directly, the error would wait for the gradient
        # at its receiver, and other messages would wait for its receipt.
        hops = [(Point(b + 1, "B"), Point(b, "B")) for b in earlier]
        return (
            *forward_routes(blocks),
            *(Route(*hop, name) for hop in hops for name in (ERROR, GRADIENT)),
        )

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the scaled error (rows, outputs), or the true gradient: ``x.grad`` of an inner
        block is not the true one."""
        assert micro_batch is not None
        if route.name == ERROR and ERROR in micro_batch.received:
            return micro_batch.received[ERROR]
        if route.name == ERROR:
            return (micro_batch.sample_scale * output_error(micro_batch)).flatten(1)
        if route.name == GRADIENT and TRUE_GRADIENT in micro_batch.received:
            return micro_batch.received[TRUE_GRADIENT]
        return super().make_message(route, block, micro_batch)

    def feedback_pair(
        self, spec: BlockSpec, micro_batch: MicroBatch, matrix: Tensor
    ) -> BackwardPair:
        """Return the output with the cotangent e B."""
        error = micro_batch.received[ERROR].to(matrix.dtype)
        if self.per_position:
            cotangent = _project_positions(spec, error, matrix).flatten(1)
        else:
            cotangent = error @ matrix
        if self.angles:
            gradient = micro_batch.received[GRADIENT].flatten(1)
            micro_batch.metrics[ANGLE] = mean_angle_deg(cotangent, gradient)
            if micro_batch.x.requires_grad:  # otherwise it is not sent
                micro_batch.received[TRUE_GRADIENT] = input_gradient(micro_batch)
        if self.normalised:
            cotangent = cotangent / math.sqrt(matrix.shape[1])
        return micro_batch.y, cotangent.view_as(micro_batch.y)

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of convolutions, and of large matrices over all positions."""
        reason = "DFA is known to fail on convolutions, which may be too narrow to align"
        return [*convolution_warnings("dfa", specs, reason), *self._matrix_warnings(specs)]

    def _matrix_warnings(self, specs: Sequence[BlockSpec]) -> Iterator[str]:
        """Warn of the largest matrix from the outputs of all positions to all of a block."""
        widths = [math.prod(spec.output_shape) for spec in specs if not spec.is_last]
        numbers = max(widths, default=0) * specs[0].scores_width
        if specs[0].has_positions and not self.per_position and numbers > MAX_MATRIX_NUMBERS:
            yield (
                f"the feedback matrix of block {widths.index(max(widths))} has {numbers:,} numbers "
                f"({specs[0].scores_width:,} outputs x {max(widths):,}), since it joins all "
                "positions: set per-position = true for one small matrix for every position"
            )


def _checked_layout(spec: BlockSpec) -> PositionLayout:
    """Return the layout of a block whose positions are those of the prediction.

    Raises
    ------
    ConfigError
        There are no positions, or others.
    """
    if not spec.has_positions:
        raise ConfigError(
            "objective.no-positions",
            "[objective] per-position = true needs a target with positions, but the model predicts "
            f"{spec.scores_shape} for a sample: leave it out",
        )
    layout = position_layout(spec)
    if layout.resized:
        raise ConfigError(
            "task.head-positions",
            f"block {spec.index} returns {spec.output_shape} for a sample, and the model predicts "
            f"{spec.scores_shape}: per-position = true needs the same positions; cut where they "
            "are equal, or leave it out",
        )
    return layout


def _project_positions(spec: BlockSpec, error: Tensor, matrix: Tensor) -> Tensor:
    """Return e_p B at each position p, in the shape of the block's output (rows, ...)."""
    layout = position_layout(spec)
    outputs = error.view(-1, *spec.scores_shape).movedim(layout.target, -1)
    return (outputs @ matrix).movedim(-1, layout.source)


def mean_angle_deg(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean over rows of the angle in degrees between the vectors (rows, width)."""
    # Torch's cosine similarity treats norms below 1e-8 as zero; errors can be smaller.
    a, b = (normalize(vectors.double(), eps=1e-100) for vectors in (left, right))
    # By the half angle, since an arc cosine near 1 loses half of the digits.
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))).mean()


def input_gradient(micro_batch: MicroBatch) -> Tensor:
    """Return the true gradient (rows, ...) at x, given that at y. Retains the graph for the
    block's own backward."""
    cotangent = micro_batch.received[GRADIENT]
    (gradient,) = eager_torch.gradients([micro_batch.y], [micro_batch.x], [cotangent])
    return torch.zeros_like(micro_batch.x) if gradient is None else gradient
