"""What objectives share whose earlier blocks keep what they know of the sample, beside the label.

::

    sample ---------------------------------.--------------------------.
       |                                    |                          |
       '-> block 0 --h--> next              v                          v
              |                   lambda1 reconstruction  +  lambda2 classification
              h -- path -- f --------> decoder(f)                   head(f)

Both lambdas go linearly from `lambda-first` in block 0 to `lambda-last` in block K - 2; two blocks
have the first alone. What has lambda 0 is not even built. The last block learns the true loss
through the model's own head, so one block is ordinary backpropagation.

Invariant: every earlier block reads the samples that it decodes by itself; nothing is added to the
stream.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block import Block, Pull
from dtrain.errors import Refusal
from dtrain.live import Live
from dtrain.models.images import Norm
from dtrain.objectives.objective import VOTES, Mode, Objective, born, onward
from dtrain.objectives.parts import networks
from dtrain.objectives.parts.decoder import decoder, reconstruction
from dtrain.objectives.task import Task
from dtrain.schedules.action import Route


@final
class Parts(nn.Module):
    """The helper of a block: a path to its features, the head and the decoder behind it."""

    def __init__(self, path: nn.Module, head: nn.Module | None, decoder: nn.Module | None) -> None:
        super().__init__()
        self.path, self.head, self.decoder = path, head, decoder

    def forward(self, input: Tensor) -> Tensor:
        """Return all that is made, side by side (rows, ...); run for its cost alone."""
        features = self.path(input)
        made = [each(features) for each in (self.head, self.decoder) if each is not None]
        return torch.cat([each.flatten(1) for each in made], 1)


@dataclass(frozen=True)
class Informed(Objective):
    """Reconstruction and classification; prediction: last block, and the vote (sum).

    Parameters
    ----------
    head : str
        "1c2f" or "greedy": see `networks`.
    norm : str
        Of head and decoder: "batch" (the papers'), "group" or "none".
    groups : int
        Of "group": groups of channels.
    lambda_first, lambda_last : (float, float)
        Factors of reconstruction and classification in block 0, and in the last but one.
    """

    schedule: ClassVar[str] = "stream"
    raw: ClassVar[bool] = True

    head: Literal["1c2f", "greedy"] = "1c2f"
    norm: Norm = "batch"
    groups: int = 8
    lambda_first: tuple[float, ...] = (5.0, 0.5)
    lambda_last: tuple[float, ...] = (0.5, 1.0)

    def __post_init__(self) -> None:
        for key, pair in (("first", self.lambda_first), ("last", self.lambda_last)):
            if len(pair) != 2 or not all(0 <= each < math.inf for each in pair):
                raise Refusal(
                    f"[objective] lambda-{key} = {[*pair]}: give two factors of at least 0, of the "
                    "reconstruction and of the classification, as in [5.0, 0.5]"
                )
            if not any(pair):
                raise Refusal(
                    f"[objective] lambda-{key} = {[*pair]}: the {key} of the earlier blocks would "
                    "learn nothing: give one factor above 0"
                )

    @property
    def carries(self) -> bool:
        """Published for 16 blocks."""
        return True

    def lambdas(self, task: Task) -> tuple[float, float]:
        """Return the factors of an earlier block."""
        span = task.blocks - 2
        part = task.block / span if span > 0 else 0.0
        ends = zip(self.lambda_first, self.lambda_last, strict=True)
        kept, told = ((1 - part) * first + part * last for first, last in ends)
        return kept, told

    @abstractmethod
    def path(self, task: Task) -> tuple[nn.Module, tuple[int, ...]]:
        """Return what leads from a block's output to its features, and their shape."""

    def scores(self, task: Task) -> int:
        """Return how many numbers a head makes of a sample."""
        return task.classes

    def classification(self, task: Task, made: Tensor, live: Live) -> tuple[str, Tensor]:
        """Return name and mean over rows of the loss of what the head made."""
        return "ce", cross_entropy(made, live.targets)

    def build(self, task: Task) -> nn.Module | None:
        """Return path, head and decoder of an earlier block, none at the end."""
        if task.last:
            return None
        kept, told = self.lambdas(task)
        (path, shape), kind = self.path(task), (self.norm, self.groups)
        outs, head = self.scores(task), None
        if told and self.head == "greedy":
            head = networks.greedy(shape, outs)
        elif told:
            head = networks.one_convolution(shape, outs, *kind)
        return Parts(path, head, decoder(shape, task.sample, *kind) if kept else None)

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Activations go on; in prediction the sum of the scores so far rides beside them."""
        votes = onward(blocks, VOTES) if mode == "predict" else ()
        return (*onward(blocks), *votes)

    def reads(self, task: Task, mode: Mode) -> bool:
        """In training all that decode read the data."""
        decodes = mode == "train" and not task.last and self.lambdas(task)[0] > 0
        return task.block == 0 or decodes

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the sum of both losses, or in the last block the true one."""
        if block.helper is None:
            return [born(live, live.y)]
        assert isinstance(block.helper, Parts)
        features, (kept, told) = block.helper.path(live.y), self.lambdas(task)
        terms = []
        if block.helper.head is not None:
            name, loss = self.classification(task, block.helper.head(features), live)
            live.figures[name] = loss.detach()
            terms.append(told * loss)
        if block.helper.decoder is not None:
            loss = reconstruction(block.helper.decoder, features, live)
            live.figures["reconstruction"] = loss.detach()
            terms.append(kept * loss)
        total = torch.stack(terms).sum()
        live.loss = total.detach()
        return [(total, torch.full_like(total, live.share))]

    def predict(self, task: Task, block: Block, live: Live) -> Tensor | None:
        """Return the class scores (rows, classes), None where the block has no head for them."""
        if block.helper is None:
            return live.y
        assert isinstance(block.helper, Parts)
        if block.helper.head is None:
            return None
        scores: Tensor = block.helper.head(block.helper.path(live.y))
        return scores
