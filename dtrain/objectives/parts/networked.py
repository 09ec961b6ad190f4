"""What objectives share whose earlier blocks have one of `networks` for a head.

Invariant: the run file's keys for a head mean the same in all of them, so that they can be
compared with the same heads. Units of "auglocal", for 6 blocks, depth 3, pyramid 0.5::

    block    0         1         2         3         4         5
    units    3         3         2         2         2      (own head)     freshly drawn, with
                                                                           the shapes of layers
                                                                           that come later

    d_k = max(1, round(d (1 - c r) + c r)),  r = k / (K - 2), and d where there are two blocks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from dtrain.errors import Refusal
from dtrain.models.images import Norm
from dtrain.objectives.parts import networks
from dtrain.objectives.parts.heads import Heads
from dtrain.objectives.parts.networks import Unit
from dtrain.objectives.task import Task


@dataclass(frozen=True)
class Networked(Heads):
    """A learned network per earlier block.

    Parameters
    ----------
    head : str
        "greedy", "dgl", "auglocal" or "1c2f" (that of InfoPro, without its decoder).
    norm : str
        Of all but "greedy": "batch" (the papers'; couples the samples of a micro-batch), "group"
        or "none".
    groups : int
        Of "group": groups of channels.
    hidden : int
        Of "dgl": linear layers before the one to the classes.
    depth : int
        Of "auglocal": units of the first block's head.
    pyramid : float
        Of "auglocal": what part of the units beyond the first is gone in the last but one block;
        0 gives all blocks as many.
    unit : str
        Of "auglocal", for images: "residual" (two 3x3 convolutions beside a shortcut, which
        projects where the shape changes) or "convolution" (one of 3x3).
    """

    head: Literal["greedy", "dgl", "auglocal", "1c2f"] = "greedy"
    norm: Norm = "batch"
    groups: int = 8
    hidden: int = 3
    depth: int = 2
    pyramid: float = 0.5
    unit: Unit = "residual"

    def __post_init__(self) -> None:
        if self.hidden < 0:
            raise Refusal(f"[objective] hidden = {self.hidden}: give at least 0")
        if self.depth < 1:
            raise Refusal(
                f'[objective] depth = {self.depth}: give at least 1, or head = "greedy" for none'
            )
        if not 0 <= self.pyramid <= 1:
            raise Refusal(f"[objective] pyramid = {self.pyramid}: give 0 (no pyramid) to 1")

    @property
    def ahead(self) -> bool:
        """Whether heads are shaped by the layers that come later."""
        return self.head == "auglocal"

    @property
    def carries(self) -> bool:
        """Whether the head was published for many blocks."""
        return self.head == "auglocal"

    def network(self, task: Task) -> nn.Module:
        """Return the head for outputs of `task`."""
        match self.head:
            case "dgl":
                return networks.dgl(task.outputs, task.classes, self.norm, self.groups, self.hidden)
            case "1c2f":
                return networks.one_convolution(task.outputs, task.classes, self.norm, self.groups)
            case "auglocal":
                shapes = [each.outputs for each in task.later[:-1]]  # the model's head apart
                wanted = networks.sampled(shapes, self.units(task))
                return networks.auglocal(
                    task.outputs, wanted, task.classes, self.unit, self.norm, self.groups
                )
        return networks.greedy(task.outputs, task.classes)

    def units(self, task: Task) -> int:
        """Return how many units the head of a block has, d_k above."""
        span = task.blocks - 2
        gone = self.pyramid * task.block / span if span > 0 else 0.0
        return max(1, round(self.depth * (1 - gone) + gone))
