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
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from dtrain.block import Block, Pull
from dtrain.errors import Refusal
from dtrain.live import Live
from dtrain.objectives.objective import GRADIENT, Mode, Objective, born, onward
from dtrain.objectives.parts.synthesiser import Past, Synthesiser
from dtrain.objectives.task import Task
from dtrain.schedules.action import Point, Route

FIGURE = "synthetic_cosine"


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
                raise Refusal(f"[objective] {name} = {value}: give at least 0")

    @property
    def schedule(self) -> str:
        """Stream where the gradients come late enough for it."""
        return "stream" if self.lag > 1 else "1f1b"

    def build(self, task: Task) -> nn.Module | None:
        """Return the synthesiser of an earlier block, none at the end."""
        classes = task.classes if self.conditional else 0
        return None if task.last else Synthesiser(task.outputs, classes, self.hidden)

    def remembers(self, task: Task) -> int:
        """Outputs of `lag` updates."""
        return 0 if task.last else self.lag * math.prod(task.outputs) * task.dtype.itemsize

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Activations go on; in training gradients (rows, ...) come back, late."""
        down = range(blocks - 1) if mode == "train" else ()
        back = (Route(Point(b + 1, "B"), Point(b, "B"), GRADIENT, self.lag) for b in down)
        return (*onward(blocks), *back)

    def tell(self, route: Route, block: Block, live: Live | None) -> Tensor:
        """Give gradients of each sample's own loss, not of its share in the mean."""
        told = super().tell(route, block, live)
        if route.name != GRADIENT:
            return told
        assert live is not None
        return told * (len(live.targets) / live.share)

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the output along the guess, and an earlier guess to the gradient that has come."""
        helper = block.helper
        if helper is None:
            return [born(live, live.y)]
        assert isinstance(helper, Synthesiser)
        with torch.no_grad():
            guess = helper(live.y.detach(), live.targets)
        pulls = [(live.y, guess * (live.share / len(live.targets)))]
        past = helper.recall(live, self.lag)
        if GRADIENT in live.told and past is not None and 2 * live.draws.rows >= past.rows:
            pulls.append(regressed(helper, past, live))
        return pulls


def regressed(helper: Synthesiser, past: Past, live: Live) -> Pull:
    """Return the pull of a synthesiser to what was told; leave loss and cosine behind.

    All replicas and micro-batches together learn the mean over the rows of the past update.
    """
    told, guess = live.told[GRADIENT], helper(past.y, past.targets)
    loss = mse_loss(guess, told)
    cosine = cosine_similarity(guess.detach().flatten(1), told.flatten(1))
    live.loss, live.figures[FIGURE] = loss.detach(), cosine.mean()
    # Replicas are weighed by their rows of this update, and shares are of its rows.
    updates = live.draws.rows / past.rows if past.rows else 1.0
    share = live.share / len(live.targets) * len(past.y) * updates
    return loss, torch.full_like(loss, share)
