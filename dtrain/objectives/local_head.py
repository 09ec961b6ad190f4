"""Local heads: every earlier block classifies through a small network that learns with it.

Belilovsky, Eickenberg and Oyallon, "Decoupled greedy learning of CNNs", arXiv 1901.08164. All
blocks learn at the same time, and a block hands on what it made before its own update. Two heads:
"greedy", the mean over all pixels and one linear layer; "dgl", the paper's "MLP-SR"::

    (c, H, W) - mean to ceil(H/4) x ceil(W/4) - 3 x (conv 1x1 - norm - ReLU)
              - mean to 2x2 - 3 x (linear to 4c - norm - ReLU) - linear to the classes

Outputs that are no images are flattened: "greedy" is then one linear layer, "dgl" the last line
with as many units as the output has.

Invariant: nothing is added to the stream, so the net that is exported is the net that was trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Literal, final

from torch import nn

from dtrain.errors import Refusal
from dtrain.models.images import Norm, Pooled, conv, norm
from dtrain.objectives.heads import Heads
from dtrain.objectives.task import Task

CONVOLUTIONS = 3


@final
@dataclass(frozen=True)
class LocalHead(Heads):
    """A learned network per earlier block; prediction: last block, and the vote (sum).

    Parameters
    ----------
    head : str
        "greedy" or "dgl".
    norm : str
        Of "dgl": "batch" (the paper's; couples the samples of a micro-batch), "group" or "none".
    groups : int
        Of "dgl" with "group": groups of channels.
    hidden : int
        Of "dgl": linear layers before the one to the classes.
    """

    head: Literal["greedy", "dgl"] = "greedy"
    norm: Norm = "batch"
    groups: int = 8
    hidden: int = 3

    def __post_init__(self) -> None:
        if self.hidden < 0:
            raise Refusal(f"[objective] hidden = {self.hidden}: give at least 0")

    def network(self, task: Task) -> nn.Module:
        """Return the head for outputs of `task`."""
        if self.head == "dgl":
            return self._dgl(task)
        if len(task.outputs) == 3:
            return Pooled(task.outputs[0], task.classes)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(task.outputs), task.classes))

    def _dgl(self, task: Task) -> nn.Sequential:
        """Return convolutions, where there are pixels, and the perceptron behind them."""
        convolutions: list[nn.Module] = []
        width = math.prod(task.outputs)
        if len(task.outputs) == 3:
            channels, *size = task.outputs
            pooled = [math.ceil(pixels / 4) for pixels in size]
            # Fewer than 2 x 2 pixels are left as they are: copies of them would teach nothing.
            final = [min(2, pixels) for pixels in pooled]
            convolutions = self._convolutions(channels, (pooled[0], pooled[1]))
            convolutions.append(nn.AdaptiveAvgPool2d((final[0], final[1])))
            width = channels * math.prod(final)
        layers = chain.from_iterable(
            (nn.Linear(width, width), norm(self.norm, width, self.groups, False), nn.ReLU())
            for _ in range(self.hidden)
        )
        return nn.Sequential(*convolutions, nn.Flatten(), *layers, nn.Linear(width, task.classes))

    def _convolutions(self, channels: int, size: tuple[int, int]) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(size)]
        for _ in range(CONVOLUTIONS):
            made = conv(channels, channels, 1, bias=self.norm == "none")
            layers += [made, norm(self.norm, channels, self.groups), nn.ReLU()]
        return layers
