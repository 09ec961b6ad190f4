"""DNI, decoupled neural interfaces: a block learns at once, from a synthetic gradient.

Jaderberg et al. 2017, arXiv 1608.05343. A synthesiser m_k(h_k, one-hot label) predicts the gradient
of a sample's loss at the output h_k of block k. The block learns from the prediction without
waiting. The next block sends the gradient at its input back, `lag` updates later, and m_k learns
the mean squared error to it. That gradient follows from the next block's own prediction
(bootstrapped), in the last block from the true loss. With a perfect m_k the method is
backpropagation, and so it is with one block::

    update u        F  h_0 -------> h_1 -------> loss             block 0: dW_0 += m_0(h_0) dh_0
                    B      <- dh_0       <- dh_1    in transit    block 1: dW_1 += m_1(h_1) dh_1
    update u + lag  B  m_0 learns |m_0(h_0 of u) - dh_0 of u|^2

Gradients are those of each sample's own loss, so they do not depend on the batch size. The last
layer of m_k starts at zero, so a block learns nothing until its m_k has learnt. Messages do not
cross the end of a segment. A message to an update of less than half the size (the last one of an
epoch) is not used, since that update may lack micro-batches: m_k learns nothing in those few
updates. They count as zero in the means of `loss` (the squared error) and of `synthetic_cosine`
(the cosine to the received gradient).

The paper's synthesisers have batch normalisation, which would couple the samples; these have none.

Invariant: cached outputs of earlier updates are used in the same segment or never, so no checkpoint
contains them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss, one_hot

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import (
    GRADIENT,
    ExecutionMode,
    Objective,
    backward_routes,
    forward_routes,
    loss_pair,
    needs_means_over_samples,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.field_checks import check_hidden, check_lag
from dtrain.schedules.actions import Route
from dtrain.tasks.task import Task

SYNTHETIC_COSINE = "synthetic_cosine"


@final
@dataclass(frozen=True)
class Dni(Objective):
    """Synthetic gradients. The last block predicts; the others have no scores.

    Parameters
    ----------
    conditional : bool
        Whether synthesisers get the label (the paper's cDNI).
    hidden : int
        Layers of a synthesiser before its last one.
    lag : int
        Delay of gradients in updates. With 2 no block waits under "stream"; with 0 they are of the
        same micro-batch, block after block, under "1f1b" or "drained".

    Raises
    ------
    ConfigError
        `hidden` or `lag` is negative.
    """

    conditional: bool = True
    hidden: int = 0
    lag: int = 2

    def __post_init__(self) -> None:
        check_hidden(self.hidden)
        check_lag(self.lag)

    def serves(self, task: Task) -> str | None:
        """Return None, unless samples count by weight: synthesisers learn a mean over rows."""
        return needs_means_over_samples(task)

    @property
    def default_schedule(self) -> str:
        """Return "stream" if gradients are late enough for it, else "1f1b"."""
        return "stream" if self.lag > 1 else "1f1b"

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the synthesiser of an earlier block."""
        width = block.task.target_width(block.classes) if self.conditional else 0
        return Synthesiser(block.output_shape, width, self.hidden)

    def cached_bytes_per_sample(self, spec: BlockSpec) -> int:
        """Return the bytes of the outputs of `lag` updates."""
        return 0 if spec.is_last else self.lag * math.prod(spec.output_shape) * spec.dtype.itemsize

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward; in training gradients (rows, ...) back, `lag` updates late."""
        backward = backward_routes(blocks, lag=self.lag) if mode == "train" else ()
        return (*forward_routes(blocks), *backward)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return gradients of each sample's own loss, without the factor of the mean."""
        message = super().make_message(route, block, micro_batch)
        if route.name != GRADIENT:
            return message
        assert micro_batch is not None
        return message * (len(micro_batch.targets) / micro_batch.loss_scale)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the output with its synthetic gradient, and the synthesiser's loss where a
        gradient has arrived; in the last block the loss."""
        synthesiser = block.head
        if synthesiser is None:
            return [loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(synthesiser, Synthesiser)
        task, targets = micro_batch.task, micro_batch.targets
        if self.conditional and not task.class_per_sample:
            targets = task.target_vectors(targets, spec.classes)
        with torch.no_grad():
            gradient = synthesiser(micro_batch.y.detach(), targets)
        scale = micro_batch.loss_scale / len(micro_batch.targets)
        pairs = [(micro_batch.y, gradient * scale)]
        past = synthesiser.store_and_fetch(micro_batch, targets, self.lag)
        if (
            GRADIENT in micro_batch.received
            and past is not None
            and 2 * micro_batch.row_random.total_rows >= past.update_rows
        ):
            pairs.append(synthesiser_loss_pair(synthesiser, past, micro_batch))
        else:  # gradients of zero, so that the moments of the optimizer decay
            pairs += [(p, torch.zeros_like(p)) for p in synthesiser.parameters()]
        return pairs


def synthesiser_loss_pair(
    synthesiser: Synthesiser, past_batch: PastMicroBatch, micro_batch: MicroBatch
) -> BackwardPair:
    """Return the squared error of a synthesiser to the received gradient; records it and the
    cosine.

    Over all replicas and micro-batches this is the mean over the rows of the past update.
    """
    gradient = micro_batch.received[GRADIENT]
    prediction = synthesiser(past_batch.y, past_batch.targets)
    loss = mse_loss(prediction, gradient)
    cosine = cosine_similarity(prediction.detach().flatten(1), gradient.flatten(1))
    micro_batch.loss = loss.detach()
    micro_batch.metrics[SYNTHETIC_COSINE] = cosine.mean()
    # Replicas are weighted by their rows of this update, and `loss_scale` refers to its rows.
    update_ratio = (
        micro_batch.row_random.total_rows / past_batch.update_rows
        if past_batch.update_rows
        else 1.0
    )
    scale = micro_batch.loss_scale / len(micro_batch.targets) * len(past_batch.y) * update_ratio
    return loss, torch.full_like(loss, scale)


class PastMicroBatch(NamedTuple):
    """Output and targets of an earlier micro-batch, and the number of rows of its whole update."""

    y: Tensor
    targets: Tensor
    update_rows: int


@final
class Synthesiser(nn.Module):
    """A network that predicts gradients (rows, ...) from outputs of the same shape.

    It consists of linear layers, or for images of 3x3 convolutions::

        y (rows, ...), one-hot label --- hidden layers --- last layer, initially zero --- gradient

    Invariant: it keeps the outputs of at most `lag` updates.

    Parameters
    ----------
    output_shape : tuple of int
        Shape of one sample.
    classes : int
        Number of label inputs, or of the numbers of a target; 0 for none.
    hidden : int
        Layers before the last one, each as wide as the output.
    """

    uses_rng = False

    def __init__(self, output_shape: tuple[int, ...], classes: int, hidden: int) -> None:
        super().__init__()
        self.output_shape = output_shape
        self.classes = classes
        self.history: dict[tuple[int, int], PastMicroBatch] = {}
        image = len(output_shape) == 3
        width = output_shape[0] if image else math.prod(output_shape)
        layers: list[nn.Module] = []
        for index in range(hidden + 1):
            inputs = width + (0 if index else classes)
            layer = nn.Conv2d(inputs, width, 3, padding=1) if image else nn.Linear(inputs, width)
            layers += [layer, nn.ReLU()]
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, y: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the predicted gradients (rows, ...) at outputs `y` of samples with labels
        `targets` (rows,), or vectors (rows, classes); without labels their inputs are 0."""
        h = y if len(self.output_shape) == 3 else y.flatten(1)
        if self.classes:
            labels = h.new_zeros(len(h), self.classes)
            if targets is not None:
                codes = targets if targets.dim() > 1 else one_hot(targets, self.classes)
                labels = codes.to(h.dtype)
            labels = labels.reshape(*labels.shape, *[1] * (h.dim() - 2))
            h = torch.cat([h, labels.expand(-1, -1, *h.shape[2:])], 1)
        gradients: Tensor = self.layers(h)
        return gradients.view_as(y)

    @property
    def cached_tensors(self) -> list[Tensor]:
        """Outputs that are kept between updates."""
        return [past.y for past in self.history.values()]

    def store_and_fetch(
        self, micro_batch: MicroBatch, targets: Tensor, lag: int
    ) -> PastMicroBatch | None:
        """Store a micro-batch with its targets; return the one of the same number `lag` updates
        ago, if any."""
        current = PastMicroBatch(micro_batch.y.detach(), targets, micro_batch.row_random.total_rows)
        update, micro = (*micro_batch.rng_key, 0, 0)[:2]
        self.history[update, micro] = current
        for key in [key for key in self.history if key[0] < update - lag]:  # never fetched
            del self.history[key]
        # In the first `lag` updates there is none, and no gradient to learn from. The memory plan,
        # which runs one micro-batch with a gradient, gets the current one.
        return self.history.pop((update - lag, micro), current if update < lag else None)
