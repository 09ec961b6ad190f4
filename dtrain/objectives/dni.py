"""DNI, decoupled neural interfaces: a block learns at once, from a guess of its gradient.

Jaderberg et al. 2017, arXiv 1608.05343. A synthesiser m_k(h_k, one-hot label) guesses the gradient
of a sample's loss at the output h_k of block k, which learns from it without a wait. The next block
sends the gradient at its input back, `lag` updates later, and m_k learns the mean squared error to
it. That gradient is made of the next block's own guess (bootstrapped); in the last block it is the
true one. With a perfect m_k it is backpropagation, and so it is with one block::

    update u        F  h_0 -------> h_1 -------> loss             block 0: dW_0 += m_0(h_0) dh_0
                    B      <- dh_0       <- dh_1    on its way    block 1: dW_1 += m_1(h_1) dh_1
    update u + lag  B  m_0 learns |m_0(h_0 of u) - dh_0 of u|^2

Gradients are those of each sample's own loss, so they do not depend on the batch's size. The last
layer of m_k starts at zero, so a block stands still until its m_k knows something. Messages do not
cross a segment's end, and those that reach an update of less than half the size (the last one of an
epoch) are not used, since it may lack micro-batches: m_k learns nothing in those few updates. They
count as zero in the means of `loss` (the squared error) and `synthetic_cosine` (to what came).

The paper's synthesisers have batch normalisation, which would couple the samples; these have none.

Invariant: what is kept of earlier updates is asked for again inside its segment or never, so no
checkpoint holds it.
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
from dtrain.errors import ConfigError
from dtrain.objectives.base import (
    GRADIENT,
    ExecutionMode,
    Objective,
    forward_routes,
    scaled_loss_pair,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.actions import Point, Route

METRIC = "synthetic_cosine"


@final
@dataclass(frozen=True)
class Dni(Objective):
    """Synthetic gradients; prediction: the last block.

    Parameters
    ----------
    conditional : bool
        Whether synthesisers look at the label (the paper's cDNI).
    hidden : int
        Layers of a synthesiser before its last one.
    lag : int
        Updates that gradients come late. With 2 nobody waits for them; with 0 they are of the same
        micro-batch, block after block, under "1f1b" or "drained".
    """

    conditional: bool = True
    hidden: int = 0
    lag: int = 2

    def __post_init__(self) -> None:
        for name in ("hidden", "lag"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError("todo.key", f"[objective] {name} = {value}: give at least 0")

    @property
    def default_schedule(self) -> str:
        """Stream where the gradients come late enough for it."""
        return "stream" if self.lag > 1 else "1f1b"

    def build_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return the synthesiser of an earlier block, none at the end."""
        classes = spec.classes if self.conditional else 0
        return None if spec.is_last else Synthesiser(spec.output_shape, classes, self.hidden)

    def cached_bytes_per_sample(self, spec: BlockSpec) -> int:
        """Outputs of `lag` updates."""
        return 0 if spec.is_last else self.lag * math.prod(spec.output_shape) * spec.dtype.itemsize

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Activations go on; in training gradients (rows, ...) come back, late."""
        down = range(blocks - 1) if mode == "train" else ()
        back = (Route(Point(b + 1, "B"), Point(b, "B"), GRADIENT, self.lag) for b in down)
        return (*forward_routes(blocks), *back)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Give gradients of each sample's own loss, not of its share in the mean."""
        told = super().make_message(route, block, micro_batch)
        if route.name != GRADIENT:
            return told
        assert micro_batch is not None
        return told * (len(micro_batch.targets) / micro_batch.loss_scale)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the output along the guess, and an earlier guess to the gradient that has come."""
        helper = block.head
        if helper is None:
            return [scaled_loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(helper, Synthesiser)
        with torch.no_grad():
            guess = helper(micro_batch.y.detach(), micro_batch.targets)
        pulls = [(micro_batch.y, guess * (micro_batch.loss_scale / len(micro_batch.targets)))]
        past = helper.store_and_fetch(micro_batch, self.lag)
        if (
            GRADIENT in micro_batch.received
            and past is not None
            and 2 * micro_batch.row_random.total_rows >= past.update_rows
        ):
            pulls.append(synthesiser_loss_pair(helper, past, micro_batch))
        return pulls


def synthesiser_loss_pair(
    synthesiser: Synthesiser, past_batch: PastMicroBatch, micro_batch: MicroBatch
) -> BackwardPair:
    """Return the pull of a synthesiser to what was told; leave loss and cosine behind.

    All replicas and micro-batches together learn the mean over the rows of the past update.
    """
    told, guess = micro_batch.received[GRADIENT], synthesiser(past_batch.y, past_batch.targets)
    loss = mse_loss(guess, told)
    cosine = cosine_similarity(guess.detach().flatten(1), told.flatten(1))
    micro_batch.loss, micro_batch.metrics[METRIC] = loss.detach(), cosine.mean()
    # Replicas are weighed by their rows of this update, and shares are of its rows.
    updates = (
        micro_batch.row_random.total_rows / past_batch.update_rows
        if past_batch.update_rows
        else 1.0
    )
    share = micro_batch.loss_scale / len(micro_batch.targets) * len(past_batch.y) * updates
    return loss, torch.full_like(loss, share)


class PastMicroBatch(NamedTuple):
    """What is kept of a micro-batch: its output, its labels, the samples of its whole update."""

    y: Tensor
    targets: Tensor
    update_rows: int


@final
class Synthesiser(nn.Module):
    """Guesses gradients (rows, ...) from outputs of the same shape; 3x3 convolutions for images.

    Parameters
    ----------
    outputs : tuple of int
        Shape of one sample.
    classes : int
        Label inputs; 0: it does not look at labels.
    hidden : int
        Layers, each as wide as the output, before the last one.
    """

    uses_rng = False

    def __init__(self, output_shape: tuple[int, ...], classes: int, hidden: int) -> None:
        super().__init__()
        self.output_shape, self.classes, self.history = (
            output_shape,
            classes,
            dict[tuple[int, int], PastMicroBatch](),
        )
        image = len(output_shape) == 3
        width = output_shape[0] if image else math.prod(output_shape)
        layers: list[nn.Module] = []
        for inner in range(hidden + 1):
            wide = width + (0 if inner else classes)
            layer = nn.Conv2d(wide, width, 3, padding=1) if image else nn.Linear(wide, width)
            layers += [layer, nn.ReLU()]
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, y: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the guess for outputs `y` of samples with labels `targets`, by default none."""
        h = y if len(self.output_shape) == 3 else y.flatten(1)
        if self.classes:
            known = h.new_zeros(len(h), self.classes)
            if targets is not None:
                known = one_hot(targets, self.classes).to(h.dtype)
            known = known.reshape(*known.shape, *[1] * (h.dim() - 2))
            h = torch.cat([h, known.expand(-1, -1, *h.shape[2:])], 1)
        made: Tensor = self.layers(h)
        return made.view_as(y)

    @property
    def cached_tensors(self) -> list[Tensor]:
        """What it keeps from update to update, beside its parameters."""
        return [past.y for past in self.history.values()]

    def store_and_fetch(self, micro_batch: MicroBatch, lag: int) -> PastMicroBatch | None:
        """Keep a micro-batch, and return the one of that number `lag` updates ago, if any."""
        now = PastMicroBatch(
            micro_batch.y.detach(), micro_batch.targets, micro_batch.row_random.total_rows
        )
        update, micro = (*micro_batch.rng_key, 0, 0)[:2]
        self.history[update, micro] = now
        for key in [key for key in self.history if key[0] < update - lag]:  # nobody asked for it
            del self.history[key]
        # A plan that counts memory asks before there is a past; a run does not.
        return self.history.pop((update - lag, micro), now if update < lag else None)
