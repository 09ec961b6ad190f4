"""Forward-forward: each block tells samples with the right label from samples with a wrong one.

Hinton, arXiv 2212.13345; code read: loeweX/Forward-Forward, facebookresearch/forwardgnn. Goodness,
labels in the sample, the loss, the probe and prediction: see `goodness`. Negatives:

"random"   a wrong label, all others being as likely.
"hard"     a wrong label in proportion to the probe's present class probabilities::

    pass 0  F   neutral --> block 0 --> block 1 --> block 2 = probe -- scores --.
    pass 1  F   block 0 [positives; negatives] <--------------------------------'
                        `--> block 1 --> block 2

           Under "pipelined" nobody waits, and the probe learns on features some updates old;
           "drained" is the synchronous form.
"hybrid"   no labels: positives are the samples, negatives mix a sample with the next one of its
           micro-batch by a smooth random mask (from memory of the paper). Only the probe predicts.

Quirks of the code of loeweX: goodness is a sum of squares, theta = d (`goodness` = "sum", whose
slope is d times that of "mean"); samples are normed on entry too (here between blocks only); peer
normalisation (`peer`, see `peers` for what differs); the gradient of ReLU is passed straight
through, also where it is off. The last would need other layers than the model's and *is not
offered*: so nothing wakes a unit that is off for every sample. ForwardGNN trains on sums and
predicts with means, which is another order of classes than "sum" only where widths differ.

Invariant: what is drawn is the sample's, whatever the cut into micro-batches and replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dtrain.block import Block, Pull
from dtrain.errors import Refusal
from dtrain.live import Given, Live
from dtrain.objectives.objective import Mode, onward
from dtrain.objectives.parts import negatives, summit
from dtrain.objectives.parts.goodness import PAIRS, SCORES, Goodness
from dtrain.objectives.parts.peers import Peers
from dtrain.objectives.task import Task
from dtrain.schedules.action import Point, Route


@final
@dataclass(frozen=True)
class ForwardForward(Goodness):
    """Goodness of positives above a threshold, of negatives below it, in every block by itself.

    Parameters
    ----------
    negatives : "random", "hard" or "hybrid"
    peer : float
        Coefficient of peer normalisation; 0 is none.
    """

    negatives: Literal["random", "hard", "hybrid"] = "random"
    peer: float = 0.03
    sums: ClassVar[tuple[str, ...]] = ("recent",)

    def __post_init__(self) -> None:
        if self.negatives == "hybrid" and self.prediction == "classes":
            raise Refusal(
                '[objective] negatives = "hybrid" learns without labels, so no goodness tells one: '
                'set prediction = "probe"'
            )

    @property
    def schedule(self) -> str:
        """Nothing comes back to block 0 but the scores of hard negatives; they do not block."""
        return "pipelined" if self.negatives == "hard" else "stream"

    @property
    def labels(self) -> bool:
        """Mixed samples need none."""
        return self.negatives != "hybrid"

    @property
    def parts(self) -> int:
        """Neutral samples have a pass of their own, or are the positives."""
        return 3 if self.negatives == "random" else 2

    def build(self, task: Task) -> Peers | None:
        """Return the mean activities of the units."""
        return Peers(task.features if task.last else task.outputs) if self.peer else None

    def helped(self, task: Task) -> None:
        """It is not run."""

    def copies(self, task: Task) -> int:
        """Return how often a sample passes the block, the neutral pass included."""
        return 2 if self.negatives == "hybrid" else 3

    def couples(self, task: Task) -> bool:
        """Mixed samples depend on each other."""
        return self.negatives == "hybrid" and task.block == 0

    def traced(self, task: Task, pass_: int) -> bool:
        """The neutral pass is for the probe, which learns on detached features."""
        return self.negatives != "hard" or pass_ == 1

    def learnt(self, task: Task, given: Given, sample: Tensor) -> Tensor:
        """Return [positives; negatives; neutral], the last not where they come apart."""
        if self.negatives == "hybrid":
            return torch.cat([sample, negatives.mixed(given, sample)])
        if self.negatives == "random":
            return super().learnt(task, given, sample)
        if not given.pass_:
            return self.neutral(task, sample)
        pair = (given.targets, negatives.hard(given, given.told[SCORES]))
        return torch.cat([self.marked(sample, one_hot(each, task.classes)) for each in pair])

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Return the way onward; with hard negatives after a pass that asks for scores."""
        if mode == "predict" or self.negatives != "hard":
            return super().routes(blocks, mode)
        asked = Route(Point(blocks - 1, "F"), Point(0, "F", 1), SCORES)
        return (*onward(blocks), *onward(blocks, PAIRS, 1), asked)

    def taught(self, task: Task, block: Block, live: Live, out: Tensor) -> list[Pull]:
        """Add the force of peer normalisation to that of the goodness."""
        pulls = super().taught(task, block, live, out)
        if isinstance(block.helper, Peers):
            positives = out[: len(live.targets)]
            block.helper.seen(positives, live.draws.rows)
            pulls.append((positives, self.peer * live.share * block.helper.force(positives)))
        return pulls

    def probing(self, block: Block, live: Live) -> Tensor:
        """Return features of neutral samples: the last rows, a pass before, or the positives."""
        if self.negatives == "random":
            return super().probing(block, live)
        asked = live.before if self.negatives == "hard" else live
        assert asked is not None
        return summit.features(block, asked)[: len(live.targets)]

    def after_update(self, task: Task, block: Block, told: Mapping[str, Tensor]) -> None:
        """Let the mean activities grow older."""
        if isinstance(block.helper, Peers):
            block.helper.aged()

    def solve(self, task: Task, block: Block) -> None:
        """Bring the mean activities up to date."""
        if isinstance(block.helper, Peers):
            block.helper.settled()
