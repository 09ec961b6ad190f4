"""What a block learns from: the tensors that are pulled, the force, and what travels for it.

Invariant: an objective names pairs (tensor, cotangent) and rows of routes, and nothing else
decides a gradient or a message. A signal is scaled once, where it is born, by the micro-batch's
share of the update; relayed signals are passed on as they came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block import Block, Live, Pull
from dtrain.schedules.action import Point, Route

Mode = Literal["train", "predict"]
ACTIVATION, GRADIENT, VOTES = "activation", "gradient", "votes"

VOTE_DTYPE = torch.float64
"""Votes are sums over blocks whose scores may differ in dtype."""


@dataclass(frozen=True)
class Task:
    """Where one block stands among the blocks of a run.

    Attributes
    ----------
    block, blocks : int
        Its position, and how many there are.
    inputs, outputs : tuple of int
        Shape of one sample that enters and that leaves.
    dtype : torch.dtype
        Of what leaves.
    classes : int
        Number of labels.
    """

    block: int
    blocks: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: torch.dtype
    classes: int

    @property
    def last(self) -> bool:
        """Whether this block ends in the model's own head."""
        return self.block == self.blocks - 1


class Objective(ABC):
    """One way for blocks to learn. Fields of a subclass are its keys in the run file.

    Attributes
    ----------
    schedule : str
        The schedule that a run file without ``[schedule]`` gets.
    """

    schedule: ClassVar[str]

    def build(self, task: Task) -> nn.Module | None:
        """Return what the objective adds to a block (a head), or None; called under its seed."""
        return None

    @abstractmethod
    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Return every row (action of a block -> action of a block) that a tensor takes."""

    @abstractmethod
    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Return the pairs (tensor, cotangent) that `block` learns; leave ``live.loss`` behind."""

    @abstractmethod
    def predict(self, task: Task, block: Block, live: Live) -> Tensor | None:
        """Return the class scores (rows, classes) of this block, None where it has none."""

    def tell(self, route: Route, live: Live) -> Tensor:
        """Return the tensor that leaves on `route` after its source action."""
        if route.name == ACTIVATION:
            return live.y.detach()
        if route.name == VOTES:
            return live.told[VOTES]
        gradient = live.x.grad
        # A block may ignore what arrives; those who wait for its feedback are told so.
        return torch.zeros_like(live.x) if gradient is None else gradient

    def shape(self, route: Route, tasks: Sequence[Task]) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape of one sample and dtype of what travels on `route`."""
        if route.name == VOTES:
            return (tasks[0].classes,), VOTE_DTYPE
        # Between neighbours, either way, travels the shape of what the lower one sends up.
        lower = tasks[min(route.source.block, route.target.block)]
        return lower.outputs, lower.dtype


def onward(blocks: int, name: str = ACTIVATION) -> tuple[Route, ...]:
    """Return the rows that take `name` from each forward to the next block's forward."""
    return tuple(Route(Point(b, "F"), Point(b + 1, "F"), name) for b in range(blocks - 1))


def born(live: Live, scores: Tensor) -> Pull:
    """Return the pull of the classification loss on `scores` (rows, classes), scaled at birth."""
    loss = cross_entropy(scores, live.targets)
    live.loss = loss.detach()
    return loss, torch.full_like(loss, live.share)
